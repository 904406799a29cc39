"""Every family on its shrunk model: a rollout is the stock call, hard gates are the runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import gated_latents

from dipgo_core.config import LossSettings, ModelSettings, SamplerSettings, SearchSettings
from dipgo_core.families import calls_of
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, loaded_model
from dipgo_core.postprocess import select
from dipgo_core.sampling import Batch, call_arguments, decode, rollout, set_sampler
from dipgo_core.search import SearchProblem
from dipgo_core.search.dipgo import search_gates
from dipgo_core.supernet import SuperNet
from dipgo_core.zoo.shrunk import PIXELS, SHRUNK, build

ITEMS = (Item("a red cat", 1), Item("the blue moon", 2))
SEEDS = (7, 8)
GRANULARITIES = ("block", "layer")


@pytest.fixture(scope="module", params=[name for name in SHRUNK if name != "flux"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    pipe = build(request.param)
    size = None if request.param == "dit" else PIXELS
    settings = ModelSettings(id=request.param, resolution=size)
    return loaded_model(pipe, settings, weights_sha256="0" * 64)


def sampler_of(model: LoadedModel, steps: int = 3) -> SamplerSettings:
    return replace(model.family.sampler, steps=steps, guidance_scale=3.0)


def stock(model: LoadedModel, sampler: SamplerSettings) -> torch.Tensor:
    set_sampler(model, sampler)
    with torch.no_grad():
        images = model.pipe(**call_arguments(model, ITEMS, SEEDS, sampler)).images
    return torch.as_tensor(images)


def random_table(graph: BlockGraph, num_calls: int, seed: int) -> GateTable:
    keep = np.random.default_rng(seed).random((num_calls, graph.num_blocks)) < 0.6
    keep[0] = True
    keep[:, [n for n in range(graph.num_blocks) if n not in graph.searched]] = True
    return GateTable(keep)


def test_rollout_decodes_to_the_stock_pipelines_images(model: LoadedModel) -> None:
    sampler = sampler_of(model)
    expected = stock(model, sampler)
    with torch.no_grad():
        images = decode(model, rollout(model, Batch(ITEMS, SEEDS), sampler))
    assert torch.equal(images, expected)
    assert images.shape == (2, 3, model.resolution, model.resolution)
    assert expected.std() > 0.01 and not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_hard_gates_of_the_supernet_equal_the_runtime(model: LoadedModel, granularity: str) -> None:
    graph, sampler = block_graph(model, granularity), sampler_of(model)
    batch = Batch(ITEMS, SEEDS)
    table = random_table(graph, calls_of(sampler), seed=1)
    gates = torch.tensor(table.keep, dtype=torch.float32).requires_grad_()
    with SuperNet(model, graph, checkpointing=True) as supernet:
        final = supernet.rollout(batch, sampler, gates)
        final.square().sum().backward()
    expected = gated_latents(model, graph, table, batch, sampler)
    scale = expected.abs().max()
    assert torch.allclose(final.detach() / scale, expected / scale, atol=1e-5)
    assert gates.grad is not None and gates.grad.isfinite().all() and gates.grad[1:].any()


def test_a_search_serves_targets(model: LoadedModel) -> None:
    graph, sampler = block_graph(model), sampler_of(model, steps=4)
    settings = SearchSettings(
        steps=3, warmup_steps=1, learning_rate=5.0, query_dim=8, loss=LossSettings(alpha=1.0)
    )
    problem = SearchProblem(
        model=model, graph=graph, sampler=sampler, settings=settings, items=ITEMS, seeds=SEEDS
    )
    last = list(search_gates(problem))[-1]
    assert last.outcome is not None
    gates = select(last.outcome, graph, 0.4, num_calls=calls_of(sampler))
    assert 0.4 <= graph.pruned_ratio(gates) < 0.7
