"""Best step mask: nearly what brute force through the hard runtime finds, at a part of its cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import comb

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
from dipgo_core.postprocess import select
from dipgo_core.sampling import Batch, rollout
from dipgo_core.search import SearchProblem, best_step_mask, search_step_masks
from dipgo_core.search.best_step_mask import Foretold

ITEMS = (Item("a red cat", 1), Item("the blue moon", 2))


def problem_of(
    pipe: object, scheduler: str = "ddim", steps: int = 5, targets: tuple[float, ...] = (0.4,)
) -> SearchProblem:
    model = tiny_model(pipe)
    return SearchProblem(
        model=model,
        graph=block_graph(model),
        sampler=SamplerSettings(scheduler=scheduler, steps=steps, guidance_scale=3.0),
        settings=SearchSettings(strategy="best_step_mask", batch_size=2),
        items=ITEMS,
        seeds=(5, 6),
        targets=targets,
    )


def brute_force(problem: SearchProblem, size: int) -> dict[tuple[int, ...], float]:
    """The oracle: every mask of so many calls as a SubNet, whole runs through the hard hooks."""
    model, graph, sampler = problem.model, problem.graph, problem.sampler
    batch = Batch(problem.items, problem.seeds)
    errors = {}
    with torch.no_grad():
        dense = rollout(model, batch, sampler)
        for later in combinations(range(1, sampler.steps), size - 1):
            table = GateTable.from_calls((0, *later), sampler.steps, graph.num_blocks)
            final = gated_latents(model, graph, table, batch, sampler)
            squares = (final - dense).double().square().flatten(1).mean(1)
            errors[(0, *later)] = float(squares.clamp(min=1e-12).log().mean())
    return errors


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m"])
@pytest.mark.parametrize("build", [tiny_sd, tiny_dit], ids=["sd", "dit"])
def test_where_all_masks_are_run_they_equal_brute_force(build, scheduler):
    problem = problem_of(build(), scheduler, targets=(0.2, 0.4, 0.6))
    last = list(search_step_masks(problem))[-1]
    assert set(last.outcome.step_masks) == {2, 3, 4}
    for count, mask in last.outcome.step_masks.items():
        errors = brute_force(problem, count)
        assert errors[mask] == pytest.approx(min(errors.values()), rel=1e-4, abs=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("build", [tiny_sd, tiny_dit], ids=["sd", "dit"])
def test_of_many_masks_a_good_one_is_found(build):
    problem = problem_of(build(), steps=9, targets=(0.5,))
    last = list(search_step_masks(problem))[-1]
    assert set(last.outcome.step_masks) == {4, 5}
    for count, mask in last.outcome.step_masks.items():
        errors = brute_force(problem, count)
        better = sum(error < errors[mask] - 1e-6 for error in errors.values())
        assert better <= 0.05 * comb(8, count - 1)


def test_a_target_between_two_numbers_of_calls_has_masks_of_both():
    """A searched SubNet spends at most its budget, a baseline at least that."""
    last = list(search_step_masks(problem_of(tiny_dit(), targets=(0.5,))))[-1]
    assert set(last.outcome.step_masks) == {2, 3}


def test_cost_is_counted_and_does_not_grow_with_the_number_of_masks():
    problem = problem_of(tiny_dit(), steps=12, targets=(0.5,))
    last = list(search_step_masks(problem))[-1]
    dense, probes = 2 * 12 + 12, 12 * 6  # latents and predictions; six skips at the most
    assert last.forwards <= dense + probes + best_step_mask.TRIED_MASKS * 6
    assert last.sample_forwards <= 2 * last.forwards
    assert last.forwards < comb(11, 5)


def test_foretold_errors_are_those_of_a_linear_run():
    """Predictions that do not depend on the latents: what is foretold is exact."""
    rng = np.random.default_rng(0)
    changes, reach = rng.normal(size=(6, 3, 40)), rng.random(6) + 0.5
    changes[0] = 0.0
    told = Foretold(np.einsum("tbn,sbn->bts", changes, changes) / 40, reach)
    predictions = changes.cumsum(0)
    masks = np.array([(True, *map(bool, one)) for one in np.ndindex(2, 2, 2, 2, 2)])
    for mask, found in zip(masks, told.scores(masks), strict=True):
        last, error = 0, np.zeros((3, 40))
        for call in range(6):
            last = call if mask[call] else last
            error += reach[call] * (predictions[call] - predictions[last])
        squares = np.maximum(np.square(error).mean(1), 1e-12)
        assert found == pytest.approx(np.log(squares).mean())


def test_exchanges_find_what_ranking_all_masks_finds(monkeypatch):
    rng = np.random.default_rng(1)
    changes = rng.normal(size=(12, 2, 30)) * np.linspace(2, 0.5, 12)[:, None, None]
    told = Foretold(np.einsum("tbn,sbn->bts", changes, changes) / 30, rng.random(12) + 0.1)
    ranked = told.best(5, 3)
    monkeypatch.setattr(best_step_mask, "RANKED", 10)
    assert told.best(5, 3)[0] == ranked[0]
    assert all(sum(mask) == 5 and mask[0] for mask in told.best(5, 3))


def test_resumed_search_ends_with_the_same_masks():
    problem = problem_of(tiny_sd(), steps=6, targets=(0.3, 0.5, 0.7))
    steps = search_step_masks(problem)
    early = next(steps)
    saved, whole = load(save(early.state())), list(steps)[-1]
    resumed = list(search_step_masks(replace(problem, resume=saved)))
    assert resumed[0].search_step == 2
    assert resumed[-1].outcome.step_masks == whole.outcome.step_masks
    (again,) = search_step_masks(replace(problem, resume=load(save(whole.state()))))
    assert again.outcome.step_masks == whole.outcome.step_masks


def test_outcome_gives_whole_calls_within_the_budget():
    problem = problem_of(tiny_dit(), targets=(0.5,))
    outcome = list(search_step_masks(problem))[-1].outcome
    gates = select(outcome, problem.graph, 0.5, num_calls=5)
    assert gates.all_or_nothing_share == 1 and gates.keep.all(axis=1).sum() == 2


def test_a_search_without_targets_is_refused():
    with pytest.raises(SearchError, match="needs targets"):
        next(search_step_masks(problem_of(tiny_dit(), targets=())))


def test_state_of_another_search_is_refused():
    problem = problem_of(tiny_dit())
    with pytest.raises(SearchError, match="belongs to another search"):
        next(search_step_masks(replace(problem, resume={"search_step": torch.tensor(1)})))
