"""Best step mask: equals brute force through the hard runtime; greedy comes close."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from safetensors.torch import load, save
from tiny import gated_latents, tiny_dit, tiny_model, tiny_sd

from dipgo_core.config import SamplerSettings, SearchSettings
from dipgo_core.errors import SearchError
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import block_graph
from dipgo_core.postprocess import select
from dipgo_core.sampling import Batch, rollout
from dipgo_core.search import SearchProblem, best_step_mask, search_step_masks

ITEMS = (Item("a red cat", 1), Item("the blue moon", 2))


def problem_of(pipe: object, scheduler: str = "ddim", steps: int = 5) -> SearchProblem:
    model = tiny_model(pipe)
    return SearchProblem(
        model=model,
        graph=block_graph(model),
        sampler=SamplerSettings(scheduler=scheduler, steps=steps, guidance_scale=3.0),
        settings=SearchSettings(strategy="best_step_mask", batch_size=2),
        items=ITEMS,
        seeds=(5, 6),
    )


def brute_force(problem: SearchProblem) -> dict[tuple[int, ...], float]:
    """The oracle: every mask as a SubNet, whole pipeline runs through the hard hooks."""
    model, graph, sampler = problem.model, problem.graph, problem.sampler
    batch = Batch(problem.items, problem.seeds)
    errors = {}
    with torch.no_grad():
        dense = rollout(model, batch, sampler)
        for size in range(sampler.steps):
            for later in combinations(range(1, sampler.steps), size):
                table = GateTable.from_calls((0, *later), sampler.steps, graph.num_blocks)
                final = gated_latents(model, graph, table, batch, sampler)
                errors[(0, *later)] = (final - dense).double().square().mean().item()
    return errors


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("build", [tiny_sd, tiny_dit], ids=["sd", "dit"])
def test_masks_equal_brute_force(build, scheduler):
    problem = problem_of(build(), scheduler)
    last = list(search_step_masks(problem))[-1]
    errors = brute_force(problem)
    assert set(last.outcome.step_masks) == {1, 2, 3, 4, 5}
    for count, mask in last.outcome.step_masks.items():
        best = min(error for calls, error in errors.items() if len(calls) == count)
        assert errors[mask] == pytest.approx(best, rel=1e-4, abs=1e-9)


def test_exhaustive_spends_one_forward_a_mask():
    problem = problem_of(tiny_dit(), steps=6)
    last = list(search_step_masks(problem))[-1]
    assert last.forwards == 6 + 2**5  # dense latents, then every mask


def test_resumed_search_ends_with_the_same_masks():
    problem = problem_of(tiny_sd(), steps=6)
    steps = search_step_masks(problem)
    early = [next(steps) for _ in range(10)][-1]
    saved, whole = load(save(early.state())), list(steps)[-1]
    resumed = list(search_step_masks(replace(problem, resume=saved)))
    assert resumed[0].search_step == 11
    assert resumed[-1].outcome.step_masks == whole.outcome.step_masks
    (again,) = search_step_masks(replace(problem, resume=load(save(whole.state()))))
    assert again.to_json() == whole.to_json()
    assert again.outcome.step_masks == whole.outcome.step_masks


@pytest.mark.parametrize("build", [tiny_sd, tiny_dit], ids=["sd", "dit"])
def test_greedy_comes_close_to_brute_force(build, monkeypatch):
    monkeypatch.setattr(best_step_mask, "EXHAUSTIVE_CALLS", 0)
    problem = problem_of(build())
    steps = list(search_step_masks(problem))
    errors = brute_force(problem)
    assert [p.kept_gates for p in steps] == [1, 2, 3, 4, 5]
    for count, mask in steps[-1].outcome.step_masks.items():
        ranked = sorted(error for calls, error in errors.items() if len(calls) == count)
        assert len(mask) == count and errors[mask] <= ranked[min(1, len(ranked) - 1)] * 1.001


def test_outcome_gives_whole_calls_within_the_budget():
    problem = problem_of(tiny_dit())
    outcome = list(search_step_masks(problem))[-1].outcome
    gates = select(outcome, problem.graph, 0.5, num_calls=5)
    assert gates.all_or_nothing_share == 1 and gates.keep.all(axis=1).sum() == 2


def test_state_of_another_search_is_refused():
    problem = problem_of(tiny_dit())
    with pytest.raises(SearchError, match="belongs to another search"):
        next(search_step_masks(replace(problem, resume={"search_step": torch.tensor(1)})))
