"""Measured errors of reuses: equal to runs through the hard runtime; resumed to the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tiny import gated_latents, tiny_dit, tiny_model, tiny_sd

from dipgo_core.config import SamplerSettings, SearchSettings
from dipgo_core.errors import SearchError
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import block_graph
from dipgo_core.sampling import Batch, rollout
from dipgo_core.search import ReuseErrors, SearchProblem, measure_errors

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

ITEMS = (Item("a red cat", 1), Item("the blue moon", 2))
CALLS = 4


def problem_of(build, scheduler: str = "ddim") -> SearchProblem:
    model = tiny_model(build())
    return SearchProblem(
        model=model,
        graph=block_graph(model),
        sampler=SamplerSettings(scheduler=scheduler, steps=CALLS, guidance_scale=3.0),
        settings=SearchSettings(strategy="calibrate", objective="latent", staleness=2),
        items=ITEMS,
        seeds=(5, 6),
    )


def measured(problem: SearchProblem) -> ReuseErrors:
    return list(measure_errors(problem))[-1].errors


@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("build", [tiny_sd, tiny_dit], ids=["sd", "dit"])
def test_reuse_at_the_last_call_costs_what_a_run_says(build, scheduler):
    """At the last call nothing comes after it, so one gain holds for all reuses, up to rounding."""
    problem = problem_of(build, scheduler)
    graph, last = problem.graph, CALLS - 1
    found = np.diag(measured(problem).covariances[last]).reshape(graph.num_blocks, 2)[:, 0]
    batch = Batch(ITEMS, problem.seeds)
    with torch.no_grad():
        dense = rollout(problem.model, batch, problem.sampler)
        for n in range(graph.num_blocks):
            keep = np.ones((CALLS, graph.num_blocks), dtype=np.bool_)
            keep[last, n] = False
            table = GateTable(keep)
            run = gated_latents(problem.model, graph, table, batch, problem.sampler)
            expected = (run - dense).double().square().mean().item()
            assert found[n] == pytest.approx(expected, rel=0.02, abs=1e-10)


def test_older_reuses_differ_and_the_first_call_has_none():
    errors = measured(problem_of(tiny_dit)).covariances
    assert not errors[0].any()
    squares = np.diagonal(errors, axis1=1, axis2=2).reshape(CALLS, -1, 2)
    assert (squares[1, :, 0] == squares[1, :, 1]).all()  # call 1 has nothing older than call 0
    assert (squares[2:, 0, 1] > squares[2:, 0, 0]).all()


def test_covariances_are_symmetric_and_positive():
    errors = measured(problem_of(tiny_sd)).covariances
    assert np.allclose(errors, errors.transpose(0, 2, 1))
    assert all(np.linalg.eigvalsh(one).min() > -1e-9 * np.trace(one) for one in errors[1:])


def test_resumed_measurement_ends_with_the_same_errors():
    problem = problem_of(tiny_sd)
    steps = measure_errors(problem)
    early = [next(steps) for _ in range(2)][-1]
    saved, whole = load(save(early.state())), list(steps)[-1]
    resumed = list(measure_errors(replace(problem, resume=saved)))
    assert [p.search_step for p in resumed] == [3, 4]
    assert np.allclose(resumed[-1].errors.covariances, whole.errors.covariances)
    again = ReuseErrors.from_tensors(load(save(whole.errors.to_tensors())))
    assert np.array_equal(again.covariances, whole.errors.covariances)


def test_dense_run_is_left_as_it_was():
    problem = problem_of(tiny_sd)
    batch = Batch(ITEMS, problem.seeds)
    with torch.no_grad():
        before = rollout(problem.model, batch, problem.sampler)
        measured(problem)
        assert torch.equal(rollout(problem.model, batch, problem.sampler), before)


def test_state_of_another_measurement_is_refused():
    with pytest.raises(SearchError, match="belongs to another search"):
        list(measure_errors(replace(problem_of(tiny_sd), resume={"x": torch.tensor(1)})))
