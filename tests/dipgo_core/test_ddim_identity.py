"""The DDIM identity: skipping whole calls is plain DDIM on the computed timesteps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tiny import DDIM, tiny_dit, tiny_model, tiny_scheduler, tiny_sd
from torch import Tensor

from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import (
    Conditioning,
    LoadedModel,
    block_graph,
    encode,
    initial_latents,
    predict,
    rollout,
    set_sampler,
    subnet_of,
)
from dipgo_core.runtime import apply_subnet, gated_calls

TEN = replace(DDIM, steps=10)
COMPUTED = (0, 3, 4, 8)
ITEMS = (Item("a red cat", 3), Item("the moon", 5))


def skipping_latents(model: LoadedModel, conditioning: Conditioning, start: Tensor) -> Tensor:
    """The ten-step run in which only the calls COMPUTED are computed."""
    graph = block_graph(model)
    gates = GateTable.from_calls(COMPUTED, 10, graph.num_blocks)
    with gated_calls(model.denoiser, graph, gates) as calls:
        return rollout(
            model, conditioning, start, TEN, on_call=lambda call, _: calls.start_call(call)
        )


def plain_ddim(model: LoadedModel, conditioning: Conditioning, start: Tensor) -> Tensor:
    """Independent oracle: DDIM (arXiv 2010.02502, eq. 12, eta 0) on the computed timesteps."""
    scheduler = model.pipe.scheduler
    timesteps = [int(scheduler.timesteps[call]) for call in COMPUTED]
    alphas, latents = scheduler.alphas_cumprod, start
    ends = [alphas[t] for t in timesteps[1:]] + [scheduler.final_alpha_cumprod]
    for timestep, after in zip(timesteps, ends, strict=True):
        now = alphas[timestep]
        output = predict(model, conditioning, latents, torch.tensor(timestep))
        if scheduler.config.prediction_type == "v_prediction":
            clean = now**0.5 * latents - (1 - now) ** 0.5 * output
            noise = now**0.5 * output + (1 - now) ** 0.5 * latents
        else:
            clean = (latents - (1 - now) ** 0.5 * output) / now**0.5
            noise = output
        latents = after**0.5 * clean + (1 - after) ** 0.5 * noise
    return latents


def distance(model: LoadedModel) -> float:
    set_sampler(model, TEN)
    conditioning = encode(model, ITEMS, TEN.guidance_scale)
    start = initial_latents(model, (1, 2))
    with torch.no_grad():
        expected = plain_ddim(model, conditioning, start)
        actual = skipping_latents(model, conditioning, start)
    return float((actual - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_skipping_whole_calls_is_ddim_on_the_computed_timesteps(
    make: Any, dtype: torch.dtype, bound: float
) -> None:
    assert distance(tiny_model(make().to(dtype))) < bound


def test_skipping_whole_calls_is_not_ddim_for_v_prediction() -> None:
    """A cached v mixes the old latents in: no identity is claimed for such models."""
    pipe = tiny_sd(tiny_scheduler(prediction_type="v_prediction"))
    assert distance(tiny_model(pipe.to(torch.float64))) > 1e-3


def test_applied_subnet_equals_the_stock_pipeline_on_the_computed_timesteps() -> None:
    """Oracle: diffusers' first-order DPM-Solver++, which is DDIM, given the timesteps."""
    model = tiny_model(tiny_sd())
    timesteps = set_sampler(model, TEN)
    graph = block_graph(model)
    gates = GateTable.from_calls(COMPUTED, 10, graph.num_blocks)
    arguments: dict[str, Any] = {"guidance_scale": 4.0, "output_type": "pt"}
    subnet, latents = subnet_of(model, graph, TEN, gates), initial_latents(model, (1,))
    with apply_subnet(model.pipe, subnet):
        skipped = model.pipe("a cat", latents=latents, num_inference_steps=10, **arguments).images
    model.pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        model.pipe.scheduler.config,
        solver_order=1,
        algorithm_type="dpmsolver++",
        final_sigmas_type="sigma_min",
    )
    kept = [timesteps[call] for call in COMPUTED]
    plain = model.pipe("a cat", latents=latents, timesteps=kept, **arguments).images
    assert torch.allclose(skipped, plain, atol=1e-5)
