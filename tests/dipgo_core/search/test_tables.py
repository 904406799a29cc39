"""Searches at a budget: within it, resumable to the same tables, no worse than their seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tiny import tiny_dit, tiny_model, tiny_sd

from dipgo_core.config import SamplerSettings, SearchSettings
from dipgo_core.errors import ConfigError, SearchError, TargetError
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import block_graph
from dipgo_core.postprocess import budget_macs, select
from dipgo_core.search import STRATEGIES, SearchProblem, SearchProgress, measure_errors
from dipgo_core.search.auto import _is_worse
from dipgo_core.search.objective import TrueObjective
from dipgo_core.search.tables import Hunt, Steps, search_tables

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

TABLES = ("calibrate", "anneal", "genetic", "random_search", "auto")
CALLS = 5
MASKS: Mapping[int, tuple[int, ...]] = {1: (0,), 2: (0, 3), 3: (0, 1, 3), 4: (0, 1, 2, 3)}
ITEMS = tuple(Item(text, label) for label, text in enumerate(("a red cat", "the moon") * 4))


def problem_of(build=tiny_sd, strategy="auto", **settings) -> SearchProblem:
    model = tiny_model(build())
    effort = 25 if strategy == "auto" else 12
    given = {"samples": 2, "effort": effort, "objective": "latent", "staleness": 2, "batch_size": 2}
    return SearchProblem(
        model=model,
        graph=block_graph(model),
        sampler=SamplerSettings(scheduler="ddim", steps=CALLS, guidance_scale=3.0),
        settings=SearchSettings(strategy=strategy, **(given | settings)),
        items=ITEMS,
        seeds=tuple(range(len(ITEMS))),
        targets=(0.5,),
        step_masks=MASKS,
    )


@cache
def prepared(build, strategy) -> SearchProblem:
    """A problem with its errors measured, and its dense latents."""
    problem = problem_of(build, strategy)
    errors = list(measure_errors(problem))[-1].errors
    return replace(problem, errors=errors.to_tensors())


def found(problem: SearchProblem) -> list[SearchProgress]:
    return list(STRATEGIES[problem.settings.strategy](problem))


@pytest.mark.parametrize("strategy", TABLES)
@pytest.mark.parametrize("build", [tiny_sd, tiny_dit], ids=["sd", "dit"])
def test_tables_stay_within_budget_for_every_target(build, strategy):
    problem = replace(prepared(build, strategy), targets=(0.4, 0.65))
    outcome = found(problem)[-1].outcome
    for target in problem.targets:
        gates = select(outcome, problem.graph, target, num_calls=CALLS)
        assert problem.graph.macs(gates) <= budget_macs(problem.graph, target, CALLS, "all")
        assert gates.keep[0].all() and problem.graph.close(gates) == gates


@pytest.mark.parametrize("strategy", TABLES)
def test_a_target_is_searched_alike_alone_and_among_others(strategy):
    problem = prepared(tiny_sd, strategy)
    alone = found(problem)[-1].outcome.tables[0.5]
    among = found(replace(problem, targets=(0.3, 0.5)))[-1].outcome.tables[0.5]
    assert alone == among


@pytest.mark.parametrize("strategy", ["anneal", "genetic", "random_search", "auto"])
def test_resumed_search_repeats_no_run_and_ends_alike(strategy):
    problem = prepared(tiny_sd, strategy)
    steps = STRATEGIES[strategy](problem)
    early = [next(steps) for _ in range(3)][-1]
    saved, whole = load(save(early.state())), list(steps)[-1]
    resumed = found(replace(problem, resume=saved))
    assert resumed[0].search_step > early.search_step
    assert resumed[-1].outcome.tables == whole.outcome.tables
    assert resumed[-1].forwards == whole.forwards
    assert resumed[-1].sample_forwards == pytest.approx(whole.sample_forwards)


@pytest.mark.parametrize("strategy", ["anneal", "genetic", "auto"])
def test_search_is_no_worse_than_its_seed_on_what_it_chose_by(strategy):
    problem = prepared(tiny_sd, strategy)
    outcome = found(problem)[-1].outcome
    everything = range(len(ITEMS)) if strategy == "auto" else chosen_by(problem)
    seed = GateTable.from_calls(MASKS[2], CALLS, problem.graph.num_blocks)
    scores = [
        score_of(problem, table, everything)
        for table in (select(outcome, problem.graph, 0.5, num_calls=CALLS), seed)
    ]
    assert scores[0] <= scores[1] + 1e-9


def chosen_by(problem: SearchProblem) -> tuple[int, ...]:
    """The items that candidates are run on, read off a search that runs its seed alone."""
    items: list[tuple[int, ...]] = []

    def steps(hunt: Hunt) -> Steps:
        items.append(hunt.screened)
        yield
        return hunt.step_mask()

    list(search_tables(problem, steps))
    return items[0]


def score_of(problem: SearchProblem, gates: GateTable, items) -> float:
    dense = GateTable.all_keep(CALLS, problem.graph.num_blocks)
    full = torch.zeros(len(ITEMS), *latents(problem, dense, (0,)).shape[1:])
    full[list(items)] = latents(problem, dense, items)
    return TrueObjective(problem, full).measure(gates, tuple(items)).score


def latents(problem: SearchProblem, gates: GateTable, items) -> torch.Tensor:
    """The oracle's own runs, one item at a time."""
    from tiny import gated_latents

    from dipgo_core.sampling import Batch

    model, graph, sampler = problem.model, problem.graph, problem.sampler
    with torch.no_grad():
        return torch.cat(
            [
                gated_latents(model, graph, gates, Batch((ITEMS[i],), (problem.seeds[i],)), sampler)
                for i in items
            ]
        )


def test_search_spends_no_more_than_its_effort():
    problem = prepared(tiny_sd, "anneal")
    last = found(problem)[-1]
    dense = CALLS * len(ITEMS)  # its own dense runs come first: nobody gave it any
    assert last.sample_forwards - dense <= problem.settings.effort * CALLS


def test_search_without_target_or_errors_is_refused():
    problem = prepared(tiny_sd, "calibrate")
    with pytest.raises(SearchError, match="needs targets"):
        found(replace(problem, targets=()))
    with pytest.raises(SearchError, match="measure_errors"):
        found(replace(problem, errors=None))
    with pytest.raises(TargetError, match="cannot be reached"):
        found(replace(problem, targets=(0.95,)))


def test_state_of_another_search_is_refused():
    problem = prepared(tiny_sd, "anneal")
    with pytest.raises(SearchError, match="belongs to another search"):
        found(replace(problem, resume={"search_step": torch.tensor(1)}))


def test_outcome_has_no_table_of_other_targets():
    problem = prepared(tiny_sd, "calibrate")
    outcome = found(problem)[-1].outcome
    with pytest.raises(ConfigError, match="search again with this target"):
        select(outcome, problem.graph, 0.4, num_calls=CALLS)


@pytest.mark.parametrize("strategy", ["calibrate", "auto"])
def test_runs_of_fewer_calls_than_staleness_are_searched(strategy):
    """Distilled models make 4 calls; the default staleness is 4."""
    sampler = SamplerSettings(scheduler="ddim", steps=3, guidance_scale=3.0)
    problem = replace(
        problem_of(strategy=strategy, staleness=4), sampler=sampler, step_masks={1: (0,)}
    )
    errors = list(measure_errors(problem))[-1].errors
    outcome = found(replace(problem, errors=errors.to_tensors()))[-1].outcome
    table = select(outcome, problem.graph, 0.5, num_calls=3)
    assert problem.graph.macs(table) <= budget_macs(problem.graph, 0.5, 3, "all")


def test_what_measuring_errors_has_cost_decides_nothing():
    """It is more where the measurement was interrupted, under the same content key."""
    problem = prepared(tiny_sd, "auto")
    dearer = {**problem.errors, "sample_forwards": torch.tensor(1e6, dtype=torch.float64)}
    first, second = (found(replace(problem, errors=one))[-1] for one in (problem.errors, dearer))
    assert first.outcome.to_json() == second.outcome.to_json()


def test_no_more_images_are_run_at_once_than_memory_was_planned_for(monkeypatch):
    seen, run = [], TrueObjective._run
    monkeypatch.setattr(
        TrueObjective,
        "_run",
        lambda self, gates, digest, items: (
            seen.append(len(items)),
            run(self, gates, digest, items),
        )[1],
    )
    found(prepared(tiny_sd, "auto"))
    assert max(seen) == 2


def test_one_image_gives_no_verdict():
    assert not _is_worse(np.array([1.0]), np.array([0.0]))
    assert _is_worse(np.array([1.0, 1.1]), np.array([0.0, 0.0]))
