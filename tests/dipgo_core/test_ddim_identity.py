"""The DDIM identity: skipping whole calls is plain DDIM on the computed timesteps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tiny import DDIM, gated_latents, tiny_dit, tiny_model, tiny_scheduler, tiny_sd
from torch import Tensor

from dipgo_core.binding import subnet_of
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import Batch, set_sampler

TEN = replace(DDIM, steps=10)
COMPUTED = (0, 3, 4, 8)
ITEMS = (Item("a red cat", 3), Item("the moon", 5))
SEEDS = (1, 2)


def skipping_latents(model: LoadedModel) -> Tensor:
    """What the ten-step run decodes in which only the calls COMPUTED are computed."""
    graph = block_graph(model)
    gates = GateTable.from_calls(COMPUTED, 10, graph.num_blocks)
    return gated_latents(model, graph, gates, Batch(ITEMS, SEEDS), TEN)


def noise(model: LoadedModel) -> Tensor:
    draws = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return torch.cat([torch.randn(1, 4, 8, 8, generator=g, dtype=model.dtype) for g in draws])


def predict(model: LoadedModel, latents: Tensor, timestep: int) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598, eq. 6) by hand, halves apart."""
    time = torch.full((len(latents),), timestep)
    if model.family.conditioning == "label":
        labels = torch.tensor([item.label for item in ITEMS])
        sides = [{"class_labels": labels}, {"class_labels": torch.full_like(labels, 1000)}]
    else:
        texts = model.pipe.encode_prompt([item.prompt for item in ITEMS], "cpu", 1, True)
        sides = [{"encoder_hidden_states": states} for states in texts]
    wanted, unwanted = (model.denoiser(latents, time, **side).sample[:, :4] for side in sides)
    return unwanted + TEN.guidance_scale * (wanted - unwanted)


def plain_ddim(model: LoadedModel) -> Tensor:
    """Independent oracle: DDIM (arXiv 2010.02502, eq. 12, eta 0) on the computed timesteps."""
    scheduler = model.pipe.scheduler
    timesteps = [int(scheduler.timesteps[call]) for call in COMPUTED]
    alphas, latents = scheduler.alphas_cumprod, noise(model)
    ends = [alphas[t] for t in timesteps[1:]] + [scheduler.final_alpha_cumprod]
    for timestep, after in zip(timesteps, ends, strict=True):
        now = alphas[timestep]
        output = predict(model, latents, timestep)
        if scheduler.config.prediction_type == "v_prediction":
            clean = now**0.5 * latents - (1 - now) ** 0.5 * output
            epsilon = now**0.5 * output + (1 - now) ** 0.5 * latents
        else:
            clean = (latents - (1 - now) ** 0.5 * output) / now**0.5
            epsilon = output
        latents = after**0.5 * clean + (1 - after) ** 0.5 * epsilon
    return latents / model.pipe.vae.config.scaling_factor


def distance(model: LoadedModel) -> float:
    set_sampler(model, TEN)
    with torch.no_grad():
        expected = plain_ddim(model)
    actual = skipping_latents(model)
    return float((actual - expected).abs().max() / expected.abs().max())


def tiny_v() -> Any:
    return tiny_sd(tiny_scheduler(prediction_type="v_prediction"))


@pytest.mark.parametrize(
    ("make", "dtype", "bound"),
    [
        (tiny_sd, torch.float64, 1e-10),
        (tiny_sd, torch.float32, 1e-5),
        (tiny_dit, torch.float64, 1e-10),
        (tiny_dit, torch.float32, 1e-5),
        # the noise scheduler takes the roots that turn v into epsilon in float32, always
        (tiny_v, torch.float64, 1e-6),
        (tiny_v, torch.float32, 1e-5),
    ],
)
def test_skipping_whole_calls_is_ddim_on_the_computed_timesteps(
    make: Any, dtype: torch.dtype, bound: float
) -> None:
    assert distance(tiny_model(make().to(dtype))) < bound


def test_applied_subnet_equals_the_stock_pipeline_on_the_computed_timesteps() -> None:
    """Oracle: diffusers' first-order DPM-Solver++, which is DDIM, given the timesteps."""
    model = tiny_model(tiny_sd())
    timesteps = set_sampler(model, TEN)
    graph = block_graph(model)
    gates = GateTable.from_calls(COMPUTED, 10, graph.num_blocks)
    arguments: dict[str, Any] = {"guidance_scale": 4.0, "output_type": "pt"}
    subnet, latents = subnet_of(model, graph, TEN, gates), noise(model)[:1]
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
