"""Stages whose layers are all dead are not entered; the images stay what they were."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from naive import naive_run
from tiny import DDIM, tiny_model, tiny_sd
from torch import Tensor, nn

from dipgo_core.binding import subnet_of
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import set_sampler

STAGES = ("down_blocks.0", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.3")


@pytest.fixture
def sd() -> LoadedModel:
    model = tiny_model(tiny_sd())
    set_sampler(model, DDIM)
    return model


def latents(model: LoadedModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    arguments = {"num_inference_steps": DDIM.steps, "guidance_scale": 4.0, "output_type": "latent"}
    return torch.as_tensor(model.pipe("the moon", generator=generator, **arguments).images)


def shallow(model: LoadedModel) -> GateTable:
    """Calls 0 and 3 whole, else the first down stage and the last up stage alone."""
    kept = ("down_blocks.0", "up_blocks.3")
    names = block_graph(model, "layer").names
    row = np.array([not name or name.startswith(kept) for name in names])
    return GateTable(np.array([row | (call in (0, 3)) for call in range(DDIM.steps)]))


def test_stages_are_entered_where_a_layer_of_theirs_matters(sd: LoadedModel) -> None:
    """Oracle: two whole calls; four more that need the first and the last stage."""
    entered = dict.fromkeys(STAGES, 0)

    def count(name: str) -> None:
        entered[name] += 1

    for name in STAGES:
        first = next(
            m for m in sd.denoiser.get_submodule(name).children() if len(list(m.children()))
        )
        inner = first[0] if isinstance(first, nn.ModuleList) else first
        inner.register_forward_pre_hook(lambda *_, name=name: count(name))  # type: ignore[misc]
    graph, gates = block_graph(sd, "layer"), shallow(sd)
    subnet = subnet_of(sd, graph, DDIM, gates)
    with apply_subnet(sd.pipe, subnet):
        latents(sd)
    assert list(entered.values()) == [6, 2, 2, 2, 6]


def test_latents_are_those_of_the_naive_run(sd: LoadedModel) -> None:
    graph, gates = block_graph(sd, "layer"), shallow(sd)
    subnet = subnet_of(sd, graph, DDIM, gates)
    plain = latents(sd)
    with apply_subnet(sd.pipe, subnet):
        pruned = latents(sd)
    with naive_run(sd.pipe, sd.denoiser, graph, list(subnet.gates.to_strings())):
        assert torch.equal(latents(sd), pruned)
    assert torch.equal(latents(sd), plain)
    assert not any("forward" in vars(module) for module in sd.denoiser.modules())
