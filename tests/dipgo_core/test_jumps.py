"""Jumps over skipped calls: where they are made, they end where the single steps do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tiny import DDIM, tiny_dit, tiny_model, tiny_scheduler, tiny_sd
from torch import Tensor

from dipgo_core.binding import subnet_of
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, loaded_model
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.zoo import shrunk

TEN = replace(DDIM, steps=10)
COMPUTED = (0, 3, 4, 8)


def tiny_v() -> Any:
    return tiny_sd(tiny_scheduler(prediction_type="v_prediction"))


def shrunk_sd3() -> Any:
    return shrunk.build("sd3")


def of(make: Callable[[], Any], dtype: torch.dtype = torch.float32) -> LoadedModel:
    settings = ModelSettings(id="tiny", resolution=64 if make is shrunk_sd3 else None)
    return loaded_model(make().to(dtype), settings, weights_sha256="0" * 64)


@contextmanager
def counted_steps(model: LoadedModel) -> Iterator[list[float]]:
    """The timesteps at which the noise scheduler makes a step, seen from below our hooks."""
    seen: list[float] = []
    scheduler = model.pipe.scheduler
    step = scheduler.step

    @functools.wraps(step)
    def counting(output: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(float(timestep))
        return step(output, timestep, *args, **kwargs)

    scheduler.step = counting
    yield seen
    del scheduler.step


def images(model: LoadedModel, sampler: SamplerSettings, **more: Any) -> Tensor:
    arguments = call_arguments(model, (Item("a red cat", 3), Item("the moon", 5)), (1, 2), sampler)
    return torch.as_tensor(model.pipe(**{**arguments, **more}).images)


def both(
    model: LoadedModel, sampler: SamplerSettings, rows: list[str] | None = None, **more: Any
) -> tuple[Tensor, Tensor, int]:
    """Images step by step and with jumps, and how many steps were made with them."""
    calls, graph = len(set_sampler(model, sampler)), block_graph(model)
    skips = GateTable.from_calls(COMPUTED, calls, graph.num_blocks)
    gates = GateTable.from_strings(rows) if rows else skips
    subnet = subnet_of(model, graph, sampler, gates)
    timesteps = model.pipe.scheduler.timesteps.tolist()
    with counted_steps(model) as seen, apply_subnet(model.pipe, subnet) as handle:
        stepwise = images(model, sampler, **more)
        assert len(seen) == calls
        handle.fuse()
        fused = images(model, sampler, **more)
        made = len(seen) - calls
        assert torch.equal(fused, images(model, sampler, **more))
    assert model.pipe.scheduler.timesteps.tolist() == timesteps
    return stepwise, fused, made


@pytest.mark.parametrize(
    ("make", "scheduler"),
    [
        (tiny_sd, "ddim"),
        (tiny_sd, "euler"),
        (tiny_v, "ddim"),
        (tiny_v, "euler"),
        (tiny_dit, "ddim"),
        (shrunk_sd3, "flow_match_euler"),
    ],
)
def test_jumps_end_where_single_steps_do(make: Callable[[], Any], scheduler: str) -> None:
    model = of(make)
    stepwise, fused, steps = both(model, replace(TEN, scheduler=scheduler))
    assert steps == len(COMPUTED)
    assert torch.allclose(stepwise, fused, atol=2e-5)


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_jumps_of_ddim_are_exact_in_double_precision(make: Callable[[], Any]) -> None:
    stepwise, fused, steps = both(of(make, torch.float64), TEN)
    assert steps == len(COMPUTED)
    assert torch.allclose(stepwise, fused, rtol=0, atol=1e-9)


@pytest.mark.parametrize("last", ["0" * 10, "1" * 10])
def test_mixed_rows_between_jumps(last: str) -> None:
    rows = ["1" * 10, "1111000001", "0" * 10, "1110000011", "0" * 10, "0" * 10, "1" * 10]
    rows += ["1110000011", "0" * 10, last]
    stepwise, fused, steps = both(of(tiny_sd), TEN, rows)
    assert steps == sum("1" in row for row in rows)
    assert torch.allclose(stepwise, fused, atol=2e-5)


@pytest.mark.parametrize(
    ("scheduler", "spacing", "steps"),
    [("dpm++2m", None, 10), ("ddim", "linspace", 10), ("ddim", "trailing", 9), ("heun", None, 6)],
)
def test_other_schedules_go_step_by_step(scheduler: str, spacing: Any, steps: int) -> None:
    model = of(tiny_sd)
    sampler = replace(TEN, scheduler=scheduler, spacing=spacing, steps=steps)
    stepwise, fused, made = both(model, sampler)
    assert torch.equal(stepwise, fused)
    assert made == len(set_sampler(model, sampler))


def test_skipped_calls_that_extrapolate_go_step_by_step() -> None:
    model = of(tiny_sd)
    graph = block_graph(model)
    set_sampler(model, TEN)
    found = []
    for extrapolation in (0.0, 1.0):
        skips = GateTable.from_calls(COMPUTED, TEN.steps, graph.num_blocks)
        subnet = subnet_of(model, graph, TEN, GateTable(skips.keep, extrapolation))
        with counted_steps(model) as seen, apply_subnet(model.pipe, subnet) as handle:
            stepwise = images(model, TEN)
            handle.fuse()
            found.append(images(model, TEN))
        assert torch.allclose(stepwise, found[-1], atol=2e-5)
        assert len(seen) == TEN.steps + (TEN.steps if extrapolation else len(COMPUTED))
    assert not torch.allclose(*found, atol=1e-3)


def test_trailing_spacing_that_divides_jumps() -> None:
    stepwise, fused, steps = both(of(tiny_sd), replace(TEN, spacing="trailing"))
    assert steps == len(COMPUTED)
    assert torch.allclose(stepwise, fused, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*callback.*:FutureWarning")
@pytest.mark.parametrize(
    "more",
    [
        {"callback_on_step_end": lambda *given: given[-1]},
        {"callback": lambda *given: None, "callback_steps": 1},  # of older releases, by **kwargs
        {"eta": 0.5},
    ],
)
def test_what_happens_at_every_step_is_not_jumped_over(more: dict[str, Any]) -> None:
    model = of(tiny_sd)
    subnet = subnet_of(model, block_graph(model), TEN, GateTable.from_calls(COMPUTED, 10, 10))
    set_sampler(model, TEN)
    with counted_steps(model) as seen, apply_subnet(model.pipe, subnet) as handle:
        handle.fuse()
        images(model, TEN, **more)
    assert len(seen) == 10


@pytest.mark.parametrize("config", [{"clip_sample": True}, {"thresholding": True}])
def test_bent_ways_are_not_straightened(config: dict[str, Any]) -> None:
    model = tiny_model(tiny_dit(tiny_scheduler(**config)))
    stepwise, fused, steps = both(model, TEN)
    assert torch.equal(stepwise, fused)
    assert steps == 10


def test_image_to_image_goes_step_by_step() -> None:
    model = of(tiny_sd)
    set_sampler(model, TEN)
    subnet = subnet_of(model, block_graph(model), TEN, GateTable.from_calls(COMPUTED, 10, 10))
    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **{name: part for name, part in model.pipe.components.items()},
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    with counted_steps(model) as seen, apply_subnet(pipe, subnet) as handle:
        handle.fuse()
        pipe("a cat", image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=10)
    assert len(seen) == 5


def test_a_run_left_early_gives_the_timesteps_back() -> None:
    model = of(tiny_sd)
    set_sampler(model, TEN)
    subnet = subnet_of(model, block_graph(model), TEN, GateTable.from_calls(COMPUTED, 10, 10))
    before = vars(model.pipe.scheduler)["timesteps"].tolist()
    model.pipe.vae.decode = lambda *_, **__: 1 / 0
    with apply_subnet(model.pipe, subnet) as handle, pytest.raises(ZeroDivisionError):
        handle.fuse()
        images(model, TEN)
    assert model.pipe.scheduler.timesteps.tolist() == before
    assert model.pipe.scheduler.num_inference_steps == 10
