"""Searches at one target: tasks, keys, what they share. Oracles: counting by hand, the settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from dipgo_core.families.sizes import known_sizes
from dipgo_core.strategies import ErrorsSettings, effective
from orchestrator.efforts import Efforts
from orchestrator.memory import ModelLoads
from orchestrator.model_tasks import ModelTasks
from orchestrator.planned import Plan
from orchestrator.records import Task
from orchestrator.sweep_settings import Baseline, SearchGrid, SweepFile
from tests.orchestrator.test_plan import plan_of, run_all
from tests.orchestrator.tiny_sweep import GRAPH, tiny_facts, tiny_sweep

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
MASKS = Baseline(name="best_step_mask")


def sweep_of(*strategies: str, **fields: Any) -> SweepFile:
    return tiny_sweep(strategies=strategies, **fields)


def with_axes(sweep: SweepFile, **axes: Sequence[Any]) -> SweepFile:
    """Return the sweep with further fields of its searches."""
    (model,) = sweep.models
    grid = SearchGrid(axes={**model.grid.axes, **axes}, losses=model.grid.losses)
    return replace(sweep, models=(replace(model, grid=grid),))


def tasks(plan: Plan, kind: str, strategy: str = "") -> list[Task]:
    found = [t.task for t in plan.tasks if t.kind == kind and t.task is not None]
    return [t for t in found if not strategy or t.inputs["search"]["strategy"] == strategy]


def test_every_target_is_a_search_of_its_own() -> None:
    plan = plan_of(sweep_of("auto", targets=(0.3, 0.5, 0.7)))
    assert [t.inputs["target"] for t in tasks(plan, "search", "auto")] == [0.3, 0.5, 0.7]
    assert len(plan.searches) == 3
    assert len({t.label for t in tasks(plan, "search", "auto")}) == 3


def test_errors_and_step_masks_come_once_before_all_that_begin_with_them() -> None:
    plan = plan_of(sweep_of("calibrate", "auto", "anneal", targets=(0.3, 0.5)))
    (errors,), masks = tasks(plan, "errors"), tasks(plan, "search", "best_step_mask")
    found = {task.key for task in masks}
    assert [task.inputs["target"] for task in masks] == [0.3, 0.5]
    needs = {
        name: {need for t in tasks(plan, "search", name) for need in t.needs[1:]}
        for name in ("calibrate", "auto", "anneal")
    }
    assert needs == {
        "calibrate": {errors.key},
        "auto": {errors.key, *found},
        "anneal": found,
    }
    (calibration,) = {t.needs[0] for t in tasks(plan, "search")}
    assert errors.needs == (calibration,)


def test_the_baseline_takes_the_masks_that_searches_begin_with() -> None:
    alone = plan_of(sweep_of("dipgo", baselines=(MASKS,)))
    both = plan_of(sweep_of("auto", baselines=(MASKS,)))
    found = [tasks(plan, "search", "best_step_mask") for plan in (alone, both)]
    keys = [[task.key for task in each] for each in found]
    assert sorted(keys[0]) == sorted(keys[1]) and len(keys[0]) == len(set(keys[0])) == 2


def test_another_target_computes_only_its_search_and_its_points() -> None:
    _, records, _ = run_all(sweep_of("auto", "calibrate", targets=(0.3, 0.5)))
    _, _, ran = run_all(sweep_of("auto", "calibrate", targets=(0.3, 0.5, 0.7)), records)
    searches = [task for task in ran if task.kind == "search"]
    assert [task.inputs["target"] for task in searches] == [0.7, 0.7, 0.7]  # and its step masks
    assert {task.kind for task in ran} == {"search", "images", "evaluate", "latency"}


def test_another_strategy_takes_the_errors_that_are_there() -> None:
    _, records, _ = run_all(sweep_of("calibrate"))
    _, _, ran = run_all(sweep_of("calibrate", "auto"), records)
    assert "errors" not in Counter(task.kind for task in ran)


def test_searches_of_all_seeds_go_by_the_same_errors() -> None:
    plan = plan_of(with_axes(sweep_of("calibrate", targets=(0.5,)), seed=(0, 1)))
    (errors,) = tasks(plan, "errors")
    assert [t.needs[1] for t in tasks(plan, "search", "calibrate")] == [errors.key] * 2


@pytest.mark.parametrize(
    ("strategy", "field", "values", "searches"),
    [
        ("auto", "steps", (8, 9), 1),
        ("auto", "query_dim", (8, 9), 1),
        ("auto", "effort", (8, 9), 2),
        ("anneal", "staleness", (2, 3), 1),
        ("calibrate", "staleness", (2, 3), 2),
        ("calibrate", "effort", (8, 9), 1),
        ("dipgo", "effort", (8, 9), 1),
        ("dipgo", "steps", (8, 9), 2),
    ],
)
def test_only_what_a_strategy_reads_makes_searches(
    strategy: str, field: str, values: tuple[int, ...], searches: int
) -> None:
    sweep = with_axes(sweep_of(strategy, targets=(0.5,)), **{field: values})
    found = tasks(plan_of(sweep), "search", strategy)
    assert len(found) == searches
    assert all((field in t.inputs["search"]) == (searches == 2) for t in found)


def test_loss_weights_make_no_searches_of_a_strategy_without_a_loss() -> None:
    plan = plan_of(sweep_of("auto", "dipgo", alphas=(0.5, 1.0), targets=(0.5,)))
    counts = Counter(t.inputs["search"]["strategy"] for t in tasks(plan, "search"))
    assert counts == {"auto": 1, "dipgo": 2, "best_step_mask": 1}


def test_convention_decides_searches_at_a_budget_and_no_others() -> None:
    sweep = sweep_of("anneal", "dipgo", targets=(0.5,))
    plans = [plan_of(replace(sweep, macs_convention=name)) for name in ("all", "paper")]
    same = {
        name: len({t.key for plan in plans for t in tasks(plan, "search", name)}) == 1
        for name in ("anneal", "dipgo", "best_step_mask")
    }
    assert same == {"anneal": False, "dipgo": True, "best_step_mask": True}


def test_searched_gates_are_those_of_the_target() -> None:
    plan, records, _ = run_all(sweep_of("auto", targets=(0.3, 0.7)))
    points = [point for point in plan.points if point.method == "search"]
    kept = [sum("1" in row for row in point.keep or ()) for point in points]
    assert kept == [7, 3]
    assert all(records[str(p.search_key)].inputs["target"] == p.target for p in points)
    assert all(p.strategy == "auto" and p.loss is None for p in points)
    assert plan.complete


def test_points_at_a_target_race_like_others() -> None:
    sweep = sweep_of("auto", "dipgo", targets=(0.3, 0.5, 0.7), rungs=(8, 16), metrics=("psnr",))
    plan, _, ran = run_all(sweep)
    assert plan.complete
    assert Counter(task.kind for task in ran)["race"] == 1


def test_layers_have_errors_of_their_own() -> None:
    plan = plan_of(with_axes(sweep_of("calibrate"), granularity=("block", "layer")))
    labels = [t.label for t in tasks(plan, "errors")]
    assert labels == ["tiny: errors of reuses", "tiny: errors of reuses of layers"]


def effort_of(plan: Plan, sweep: SweepFile, kind: str) -> list[Any]:
    efforts = Efforts(sweep, tiny_facts(sweep))
    return [efforts.of_task(t, gpu=False) for t in plan.tasks if t.kind == kind]


def test_searches_are_sized_by_what_they_may_spend() -> None:
    sweep = with_axes(sweep_of("random_search", targets=(0.5,)), effort=(30, 60))
    sizes = effort_of(plan_of(sweep), sweep, "search")
    assert [(size.group, size.images) for size in sizes] == [
        ("search, random_search", 30.0),
        ("search, random_search", 60.0),
    ]


def test_measuring_errors_is_sized_by_its_forwards() -> None:
    """Oracle: by hand, two images of 10 calls of 100 MACs: a dense run, 3 blocks at 4 ages at half
    the cost, and runs from each call on."""
    sweep = sweep_of("calibrate", targets=(0.5,))
    plan, records, _ = run_all(sweep)
    efforts = Efforts(sweep, tiny_facts(sweep))
    for record in records.values():
        if record.kind == "reference":
            efforts.learn(record)
    (size,) = [efforts.of_record(r) for r in records.values() if r.kind == "errors"]
    assert GRAPH.call_macs() == 100
    assert size.images == 2
    assert size.tmacs * 1e12 == pytest.approx(2 * 100 * 10 * (1 + 4 * 3 / 2 + 10 / 2))


@pytest.mark.parametrize(("strategy", "grows"), [("dipgo", True), ("dipgo_stepwise", False)])
def test_memory_of_a_stepwise_search_does_not_grow_with_the_calls(
    strategy: str, grows: bool
) -> None:
    """Oracle: the same model with more calls; sizes are those of a model that is known."""
    (model,) = sweep_of(strategy).models
    facts = replace(tiny_facts(sweep_of(strategy))["tiny"], sizes=known_sizes()[SDXL])
    needs = []
    for steps in (10, 50):
        longer = replace(model, sampler=replace(model.sampler, steps=steps))
        loads = ModelLoads(sweep_of(strategy), longer, facts)
        needs.append(loads.memory.fit("search", effective(model.searches()[0])).need.total)
    assert (needs[1] > needs[0]) == grows


def test_memory_is_planned_for_searches_and_errors() -> None:
    sweep = with_axes(sweep_of("auto"), seed=(0, 1))
    (model,) = sweep.models
    maker = ModelTasks(sweep=sweep, model=model, facts=tiny_facts(sweep)["tiny"], device="")
    rows = [row.label for row in maker.memory.rows if row.kind == "search"]
    assert rows == ["auto seed 0", "auto seed 1", "best_step_mask", "errors of reuses"]
    settings = ErrorsSettings.of(model.searches()[1])
    assert maker.memory.fit("search", settings).run.images == 2
