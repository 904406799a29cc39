"""Guidance off for the last calls: the stock pipeline's own way, half the work, refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import DDIM, tiny_dit, tiny_model, tiny_sd

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import ConfigError, SamplingError
from dipgo_core.evaluation.generate import generate
from dipgo_core.families import guided_share
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.sampling import Batch, call_arguments, rollout, set_sampler
from dipgo_core.subnet import SubNet

ITEMS = (Item("a red cat", 3), Item("the moon", 5))
SEEDS = (11, 12)
PLAIN = replace(DDIM, steps=5, guidance_scale=4.0)


def off_after(calls: int | None) -> SamplerSettings:
    return replace(PLAIN, guidance_calls=calls)


def latents(model: LoadedModel, sampler: SamplerSettings) -> torch.Tensor:
    with torch.no_grad():
        return rollout(model, Batch(ITEMS, SEEDS), sampler)


def test_is_the_cutoff_of_a_stock_callback() -> None:
    """Oracle: diffusers' documented cut-off, a callback that switches guidance off itself."""
    model = tiny_model(tiny_sd())
    set_sampler(model, PLAIN)

    def cut(pipe: Any, step: int, timestep: int, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 1:  # after the second call
            tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]
            pipe._guidance_scale = 0.0
        return tensors

    arguments = {**call_arguments(model, ITEMS, SEEDS, PLAIN), "output_type": "latent"}
    expected = model.pipe(
        **arguments, callback_on_step_end=cut, callback_on_step_end_tensor_inputs=["prompt_embeds"]
    ).images
    scale = model.pipe.vae.config.scaling_factor
    assert torch.allclose(latents(model, off_after(2)) * scale, expected, atol=1e-5)
    assert not torch.allclose(latents(model, PLAIN) * scale, expected, atol=1e-3)


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_all_calls_guided_or_none_is_a_plain_run(make: Any) -> None:
    """Oracle: stock runs with guidance, and at scale 1, which has none (DiT: labels come first)."""
    model = tiny_model(make())
    assert torch.equal(latents(model, off_after(5)), latents(model, PLAIN))
    unguided = latents(model, replace(PLAIN, guidance_scale=1.0))
    assert torch.allclose(latents(model, off_after(0)), unguided, atol=1e-5)


def test_halves_the_batch_of_the_last_calls_in_every_batch_of_images() -> None:
    model = tiny_model(tiny_sd())
    sizes: list[int] = []
    watch = model.denoiser.conv_in.register_forward_pre_hook(
        lambda module, args: sizes.append(len(args[0]))
    )
    items, seeds = (*ITEMS, ITEMS[0]), (*SEEDS, 13)
    list(generate(model, items, seeds, off_after(2), batch_size=2))
    watch.remove()
    assert sizes == [4, 4, 2, 2, 2, 2, 2, 1, 1, 1]
    assert "forward" not in vars(model.denoiser)


def test_share_of_the_work() -> None:
    """Oracle: by hand, 2 calls of two halves and 3 of one are 7 of 10 halves."""
    assert guided_share(off_after(2)) == 0.7
    assert guided_share(off_after(None)) == guided_share(off_after(9)) == 1.0


def test_refuses_models_whose_guidance_is_no_doubled_batch() -> None:
    model = tiny_model(tiny_sd(time_cond_proj_dim=8))  # as consistency models: embedded guidance
    with pytest.raises(SamplingError, match="batch of 2 for 2 images"):
        latents(model, off_after(2))
    flux = replace(model, family=replace(model.family, conditional=None))
    with pytest.raises(SamplingError, match="doubles no batch"):
        latents(flux, off_after(2))


def test_settings_refuse_calls_of_no_guidance_and_keep_their_old_form() -> None:
    with pytest.raises(ConfigError, match="guidance_calls"):
        replace(PLAIN, guidance_scale=1.0, guidance_calls=2)
    assert set(PLAIN.to_json()) == {"scheduler", "steps", "guidance_scale", "spacing"}
    assert SamplerSettings(**off_after(2).to_json()) == off_after(2)


def test_what_was_evaluated_tells_its_guided_calls_and_their_compute() -> None:
    """Oracle: by hand, 2 of 5 calls whole and 3 halved are 70 % of a dense run."""
    model = tiny_model(tiny_sd())
    graph = block_graph(model)
    whole = GateTable.all_keep(5, graph.num_blocks)
    told = subnet_of(model, graph, off_after(2), whole)
    assert told.sampler["guidance_calls"] == 2
    assert told.macs["pruned_ratio"] == pytest.approx(0.3)
    assert SubNet.from_json(told.to_json()).macs == told.macs
    assert "guidance_calls" not in subnet_of(model, graph, PLAIN, whole).sampler
