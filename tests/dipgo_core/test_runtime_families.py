"""apply_subnet on every family and noise scheduler, against runs that compute everything."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from naive import naive_run
from tiny import DDIM, tiny_model, tiny_scheduler, tiny_sd
from torch import Tensor

from dipgo_core.binding import subnet_of
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, loaded_model
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.zoo import shrunk

ITEMS = (Item("a red cat", 3), Item("the moon", 5))
FAMILIES = ["sd15", "sd21", "sdxl", "dit", "pixart", "sd3", "sd35", "flux-short"]


@cache
def shrunk_model(name: str) -> LoadedModel:
    return loaded_model(
        shrunk.build(name), ModelSettings(id=name, resolution=64), weights_sha256="0" * 64
    )


def random_table(graph: BlockGraph, calls: int, seed: int = 0) -> GateTable:
    """A closed table with whole, mixed and skipped calls."""
    rng = np.random.default_rng(seed)
    keep = rng.random((calls, graph.num_blocks)) < rng.uniform(0.3, 1, (calls, 1))
    keep[:, 0] = rng.random(calls) < 0.8
    keep[0] = True
    return graph.close(GateTable(keep))


def latents(model: LoadedModel, sampler: SamplerSettings) -> Tensor:
    arguments = call_arguments(model, ITEMS, (1, 2), sampler)
    arguments["output_type"] = "pil" if model.family.name == "dit" else "latent"
    found: Any = model.pipe(**arguments).images
    if isinstance(found, list):  # DiT has no latent output
        return torch.stack([torch.from_numpy(np.array(image)) for image in found])
    return torch.as_tensor(found)


def check(model: LoadedModel, sampler: SamplerSettings, granularity: str = "block") -> None:
    graph = block_graph(model, granularity)
    table = random_table(graph, len(set_sampler(model, sampler)))
    plain = latents(model, sampler)
    with apply_subnet(model.pipe, subnet_of(model, graph, sampler, table)) as handle:
        pruned = latents(model, sampler)
        assert torch.equal(latents(model, sampler), pruned)
    with naive_run(model.pipe, model.denoiser, graph, table.to_strings()):
        naive = latents(model, sampler)
    step = 1.0 if model.family.name == "dit" else 1e-4  # images of whole numbers, or latents
    torch.testing.assert_close(pruned.float(), naive.float(), atol=step, rtol=1e-4)
    assert handle.peak_cache_bytes > 0
    assert not torch.equal(pruned, plain)
    assert torch.equal(latents(model, sampler), plain)


@pytest.mark.parametrize("granularity", ["block", "layer"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_runs_its_gates(name: str, granularity: str) -> None:
    model = shrunk_model(name)
    check(model, replace(model.family.sampler, steps=5, guidance_scale=3.0), granularity)


@pytest.mark.parametrize("name", ["sdxl", "dit", "sd35"])
def test_every_kind_of_family_runs_without_guidance(name: str) -> None:
    model = shrunk_model(name)
    check(model, replace(model.family.sampler, steps=4, guidance_scale=1.0))


EPSILON = [(n, "epsilon") for n in ("ddim", "pndm", "dpm++2m", "euler", "heun", "unipc", "lcm")]


@pytest.mark.parametrize(
    ("scheduler", "prediction"),
    [*EPSILON, *((name, "v_prediction") for name in ("ddim", "dpm++2m", "euler", "heun"))],
)
def test_every_noise_scheduler_runs_its_rows(scheduler: str, prediction: str) -> None:
    model = tiny_model(tiny_sd(tiny_scheduler(prediction_type=prediction)))
    check(model, replace(DDIM, scheduler=scheduler, steps=6, spacing=None))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_spacing_runs_its_rows(spacing: Any) -> None:
    check(tiny_model(tiny_sd()), replace(DDIM, scheduler="dpm++2m", spacing=spacing))


def test_a_list_of_ones_own_runs_its_rows() -> None:
    model = tiny_model(tiny_sd())
    sampler = replace(DDIM, scheduler="euler", steps=4, timesteps=(999, 600, 300, 20))
    check(model, sampler)
    subnet = subnet_of(model, block_graph(model), sampler, GateTable.all_keep(4, 10))
    assert subnet.call_kwargs()["timesteps"] == [999, 600, 300, 20]


def test_gates_follow_where_timesteps_depend_on_the_resolution() -> None:
    """FLUX shifts its timesteps: a SubNet made at one size runs at another."""
    small = shrunk_model("flux-short")
    sampler = replace(small.family.sampler, steps=4)
    graph = block_graph(small)
    table = random_table(graph, 4)
    subnet = subnet_of(small, graph, sampler, table)
    large = replace(small, settings=replace(small.settings, resolution=128))
    timesteps = set_sampler(large, sampler)
    assert timesteps != subnet.sampler["timesteps"]
    with apply_subnet(large.pipe, subnet):
        pruned = latents(large, sampler)
    with naive_run(large.pipe, large.denoiser, graph, table.to_strings()):
        naive = latents(large, sampler)
    torch.testing.assert_close(pruned, naive, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("flux-short", {"negative_prompt": ["dog", "dog"], "true_cfg_scale": 3.0}),
        ("sd35", {"skip_guidance_layers": [1, 2], "skip_layer_guidance_stop": 0.8}),
    ],
)
def test_pipelines_that_call_the_denoiser_twice_a_step(name: str, more: dict[str, Any]) -> None:
    """True guidance of FLUX; SD3's guidance by skipped layers, which comes late and ends early."""
    model = shrunk_model(name)
    sampler = replace(model.family.sampler, steps=6, guidance_scale=3.0)
    graph = block_graph(model)
    table = random_table(graph, len(set_sampler(model, sampler)), seed=1)

    def run() -> Tensor:
        arguments = {**call_arguments(model, ITEMS, (1, 2), sampler), **more}
        return torch.as_tensor(model.pipe(**{**arguments, "output_type": "latent"}).images)

    with apply_subnet(model.pipe, subnet_of(model, graph, sampler, table)):
        pruned = run()
    with naive_run(model.pipe, model.denoiser, graph, table.to_strings()):
        torch.testing.assert_close(pruned, run(), atol=1e-4, rtol=1e-4)
