"""Explorations in a plan: what is proposed when, and when it ends.

Oracle: the order of landing is shuffled, and everything must come out the same; areas by hand.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.config import SearchSettings
from orchestrator.explore import Trial, asked, expected_images, has_stalled, settings_of
from orchestrator.jobs import Jobs
from orchestrator.plan import Planner, build_plan
from orchestrator.planned import Plan, PlannedTask
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.sweep_settings import Dimension, Explore, ExploreStop, SweepFile
from tests.orchestrator.finished_sweep import finish, run_finished_task, sweep_facts
from tests.orchestrator.tiny_sweep import ALL_BASELINES, run_tiny_task, tiny_sweep

OVER = {
    "loss.alpha": Dimension(kind="loguniform", low=0.1, high=4.0),
    "seed": Dimension(kind="int", low=0, high=50),
    "loss.gamma": Dimension(kind="choice", choices=(True, False)),
}


def exploring(points: int = 10, *, rungs: tuple[int, ...] = (), **changes: Any) -> SweepFile:
    """Return a sweep whose model explores in batches of four."""
    sweep = tiny_sweep(baselines=ALL_BASELINES[1:2], metrics=("clip", "psnr"), rungs=rungs)
    (model,) = sweep.models
    fields: dict[str, Any] = {"points": points, "over": OVER, "batch": 4, "sampler": "random"}
    return replace(sweep, models=(replace(model, explore=Explore(**(fields | changes))),))


def plan_of(sweep: SweepFile, store: Store, failed: frozenset[str] = frozenset()) -> Plan:
    facts = sweep_facts(sweep)
    return build_plan(sweep, store.records(), facts=facts, device="cpu", failed=failed)


def land(
    sweep: SweepFile,
    store: Store,
    pick: Callable[[list[Task]], Task] = lambda ready: ready[0],
    *,
    at_most: int = 10_000,
    fails: Callable[[Task], bool] = lambda task: False,
) -> frozenset[str]:
    """Run one ready task after another, the one that is picked; return the keys that failed."""
    failed: frozenset[str] = frozenset()
    planner = Planner(sweep, facts=sweep_facts(sweep), device="cpu")
    for _ in range(at_most):
        plan = planner.plan(store.records(), failed=failed)
        ready = [task for task in plan.ready if task.key not in failed]
        if not ready:
            break
        task = pick(ready)
        if fails(task):
            failed |= {task.key}
        else:
            run_quickly(task, store)
    return failed


def run_quickly(task: Task, store: Store) -> None:
    (run_finished_task if task.kind == "explore" else run_tiny_task)(task, store)


def proposals(store: Store) -> list[Record]:
    found = [record for record in store.records().values() if record.kind == "explore"]
    return sorted(found, key=lambda record: record.inputs["generation"])


def searches_of(sweep: SweepFile, folder: Path) -> list[PlannedTask]:
    tasks = plan_of(sweep, open_store(str(folder))).tasks
    return [task for task in tasks if task.kind == "search"]


def explored(plan: Plan) -> list[Any]:
    return [point for point in plan.points if point.variant and "explored" in point.variant]


def test_explore_proposes_batch_by_batch(tmp_path: Path) -> None:
    sweep, store = exploring(10), open_store(str(tmp_path))
    plan = finish(sweep, store).plan
    assert [len(record.outputs["points"]) for record in proposals(store)] == [4, 4, 2]
    points = explored(plan)
    assert [point.variant for point in points] == [f"explored {n}" for n in range(1, 11)]
    assert plan.complete and {point.method for point in points} == {"search"}


def test_explore_takes_the_place_of_the_grid(tmp_path: Path) -> None:
    sweep, store = exploring(4), open_store(str(tmp_path))
    plan = finish(sweep, store).plan
    searches = [task for task in plan.tasks if task.kind == "search"]
    assert len(searches) == len(plan.searches) == 4


def test_explored_settings_are_the_proposed_ones(tmp_path: Path) -> None:
    sweep, store = exploring(4), open_store(str(tmp_path))
    points = explored(finish(sweep, store).plan)
    (record,) = proposals(store)
    for point, params in zip(points, record.outputs["points"], strict=True):
        assert point.loss["alpha"] == params["loss.alpha"] and point.seed == params["seed"]
        assert point.target == params["target"] and point.search["steps"] == 8


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "random"])
def test_explore_proposes_the_same_whatever_the_order(sampler: str, tmp_path: Path) -> None:
    sweep, keys = exploring(8, sampler=sampler), []
    for seed in (None, 1):
        store = open_store(str(tmp_path / str(seed)))
        dice = random.Random(seed)
        land(sweep, store, (lambda ready: ready[0]) if seed is None else dice.choice)
        keys.append(set(store.records()))
    assert keys[0] == keys[1]


def test_explore_resumes_by_replaying_its_records(tmp_path: Path) -> None:
    """A driver that stopped anywhere leaves records; the next one goes on as if it had not."""
    sweep, whole = exploring(8, sampler="tpe"), open_store(str(tmp_path / "whole"))
    land(sweep, whole)
    for stopped_after in (3, 30):
        store = open_store(str(tmp_path / str(stopped_after)))
        land(sweep, store, at_most=stopped_after)
        land(sweep, store)
        assert set(store.records()) == set(whole.records())


def test_explore_of_more_points_keeps_the_first_ones(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    finish(exploring(6), store)
    known = {key for key, record in store.records().items() if record.kind == "search"}
    plan = plan_of(exploring(12), store)
    assert known <= {task.key for task in finish(exploring(12), store).plan.tasks}
    assert not plan.complete


def test_next_proposal_waits_for_every_result_of_the_batch(tmp_path: Path) -> None:
    sweep, store = exploring(8), open_store(str(tmp_path))
    land(sweep, store, lambda ready: next((t for t in ready if t.kind == "explore"), ready[0]),
         at_most=1)  # fmt: skip
    plan = plan_of(sweep, store)
    (waiting,) = [task for task in plan.tasks if task.kind == "explore" and task.task is None]
    searches = {task.key for task in plan.tasks if task.kind == "search" and task.task}
    assert searches <= set(waiting.needs)


def test_points_to_come_are_listed_until_they_are_known(tmp_path: Path) -> None:
    sweep, store = exploring(8), open_store(str(tmp_path))
    to_come = [t for t in plan_of(sweep, store).tasks if t.state == "unresolved"]
    kinds = [task.kind for task in to_come]
    assert kinds.count("search") == 8 and kinds.count("evaluate") >= 16
    finish(sweep, store)
    assert plan_of(sweep, store).complete


def test_failed_point_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    sweep, store = exploring(8), open_store(str(tmp_path))
    first: list[str] = []

    def fails(task: Task) -> bool:
        first[:] = first or ([task.key] if task.kind == "search" else [])
        return task.key in first

    failed = land(sweep, store, fails=fails)
    plan = plan_of(sweep, store, failed)
    (_, told) = [
        task.task.options["generations"]
        for task in plan.tasks
        if task.kind == "explore" and task.task is not None
    ]
    assert [trial["values"] is None for trial in told[0]].count(True) == 1
    assert len(explored(plan)) == 8


def test_next_run_goes_on_while_a_failed_search_is_tried_again(tmp_path: Path) -> None:
    """A new driver has no failures yet: what was proposed after one stays, and can be worked on."""
    sweep, store = exploring(12), open_store(str(tmp_path))
    first: list[str] = []

    def fails(task: Task) -> bool:
        first[:] = first or ([task.key] if task.kind == "search" else [])
        return task.key in first

    failed = land(sweep, store, fails=fails, at_most=60)
    before, after = plan_of(sweep, store, failed), plan_of(sweep, store)
    assert len(explored(after)) == len(explored(before)) == 12
    assert {task.key for task in before.ready} <= {task.key for task in after.ready}


def test_next_proposal_waits_for_searches_of_all_batches(tmp_path: Path) -> None:
    sweep, store = exploring(12), open_store(str(tmp_path))
    first: list[str] = []

    def fails(task: Task) -> bool:
        first[:] = first or ([task.key] if task.kind == "search" else [])
        return task.key in first or (task.kind == "explore" and len(proposals(store)) == 2)

    land(sweep, store, fails=fails)
    plan = plan_of(sweep, store)
    (waiting,) = [task for task in plan.tasks if task.kind == "explore" and task.task is None]
    assert len(explored(plan)) == 8 and set(first) <= set(waiting.needs)


def test_explore_ends_where_nothing_succeeds(tmp_path: Path) -> None:
    sweep, store = exploring(40), open_store(str(tmp_path))
    failed = land(sweep, store, fails=lambda task: task.kind == "search")
    assert len(explored(plan_of(sweep, store, failed))) == 4


def test_explore_ends_where_a_proposal_fails(tmp_path: Path) -> None:
    sweep, store = exploring(8, rungs=(8, 16)), open_store(str(tmp_path))
    failed = land(sweep, store, fails=lambda task: task.kind == "explore")
    plan = plan_of(sweep, store, failed)
    assert explored(plan) == [] and any(task.kind == "race" for task in plan.tasks)


def test_race_waits_for_the_last_point(tmp_path: Path) -> None:
    sweep, store = exploring(8, rungs=(8, 16)), open_store(str(tmp_path))
    held: list[Task] = []

    def pick(ready: list[Task]) -> Task:
        held.extend(task for task in ready if task.kind == "race")
        assert not held or len(proposals(store)) == 2
        return ready[0]

    land(sweep, store, pick)
    (race,) = [record for record in store.records().values() if record.kind == "race"]
    points = explored(plan_of(sweep, store))
    raced = {candidate["key"] for candidate in race.inputs["candidates"]}
    assert {(*point.lower_keys, point.evaluate_key)[0] for point in points} <= raced
    assert all(point.race_keys == (race.key,) for point in points)


def test_range_of_targets_is_explored(tmp_path: Path) -> None:
    over = {"target": Dimension(kind="uniform", low=0.3, high=0.8)}
    sweep, store = exploring(4, over=over), open_store(str(tmp_path))
    targets = [point.target for point in explored(finish(sweep, store).plan)]
    assert all(0.3 <= target <= 0.8 for target in targets) and len(set(targets)) == 4


def test_proposals_at_another_target_are_others() -> None:
    """What a sampler was told at one target says nothing at another one."""
    (model,) = exploring(8).models
    asked_at = [asked(replace(model, targets=each)) for each in ((0.5,), (0.7,), (0.5, 0.7))]
    assert asked_at[0] != asked_at[1] and asked_at[0]["target"] == 0.5
    assert "target" not in asked_at[2] and "target" in asked_at[2]["over"]


@pytest.mark.parametrize(
    ("varied", "steps"),
    [
        (Dimension(kind="int", low=100, high=500), 300),
        (Dimension(kind="choice", choices=(10, 20, 60)), 30),
        (Dimension(kind="logint", low=1, high=100), 99 / math.log(100)),
        (None, 8),
    ],
)
def test_steps_of_searches_to_come_are_the_mean(varied: Dimension | None, steps: float) -> None:
    (model,) = exploring(over={"steps": varied} if varied else OVER).models
    assert expected_images(model) == pytest.approx(steps)


def test_searches_to_come_are_estimated_as_searches(tmp_path: Path) -> None:
    """An explored search of 80 to 160 steps costs what a known one of 120 does."""
    over = {"steps": Dimension(kind="int", low=80, high=160)}
    sweep = exploring(4, over=over)
    (model,) = sweep.models
    grid = replace(model.grid, axes={**model.grid.axes, "steps": (120,)})
    known = replace(sweep, models=(replace(model, explore=None, grid=grid),))
    (come,), (there,) = (
        {Jobs(each, sweep_facts(each)).effort(task) for task in searches_of(each, tmp_path)}
        for each in (sweep, known)
    )
    assert come == there and (come.group, come.images) == ("search, dipgo", 120)


def exploring_at_targets(points: int) -> SweepFile:
    """Return a sweep whose model explores with a strategy that searches at a target."""
    over = {
        "target": Dimension(kind="uniform", low=0.3, high=0.8),
        "seed": Dimension(kind="int", low=0, high=1),
        "effort": Dimension(kind="int", low=20, high=60),
    }
    sweep = exploring(points, over=over)
    (model,) = sweep.models
    grid = replace(model.grid, axes={**model.grid.axes, "strategy": ("auto",)})
    return replace(sweep, models=(replace(model, grid=grid),))


def test_proposals_of_a_search_at_a_target_are_searched_at_their_own(tmp_path: Path) -> None:
    sweep, store = exploring_at_targets(8), open_store(str(tmp_path))
    land(sweep, store)
    plan = plan_of(sweep, store)
    records = [store.records()[str(point.search_key)] for point in explored(plan)]
    proposed = [each for record in proposals(store) for each in record.outputs["points"]]
    assert plan.complete
    assert [r.inputs["target"] for r in records] == [each["target"] for each in proposed]
    assert [r.inputs["search"]["effort"] for r in records] == [e["effort"] for e in proposed]
    measured = [r for r in store.records().values() if r.kind == "errors"]
    assert len(measured) == 1


def test_searches_at_targets_to_come_are_estimated_by_their_effort(tmp_path: Path) -> None:
    sweep = exploring_at_targets(4)
    found = {
        Jobs(sweep, sweep_facts(sweep)).effort(task)
        for task in searches_of(sweep, tmp_path)
        if task.task is None
    }
    assert [(effort.group, effort.images) for effort in found] == [("search, auto", 40)]


def test_settings_of_a_proposal_leave_the_rest() -> None:
    base = SearchSettings(steps=7)
    found = settings_of(base, {"loss.alpha": 2.0, "seed": 3, "target": 0.5})
    assert found == replace(base, seed=3, loss=replace(base.loss, alpha=2.0))


# --- when to stop --------------------------------------------------------------------------------


def batch(*values: tuple[float, float] | None, hours: float = 1.0) -> tuple[Trial, ...]:
    """Return a generation whose searches took `hours` each."""
    return tuple(
        Trial(params={}, values=value, search=f"{value} {hours}", gpu_hours=hours)
        for value in values
    )


STOP = ExploreStop(epsilon=0.1, gpu_hours=2.0)


def test_stop_waits_for_the_hours() -> None:
    """One hour a generation: two hours without growth have passed after the third."""
    first = batch((2.0, 1.0), (1.0, 2.0), hours=0.5)
    same = [batch((1.5, 1.0)), batch((1.2, 1.0))]
    assert not has_stalled([first, same[0]], STOP)
    assert has_stalled([first, *same], STOP)


def test_stop_counts_growth_as_a_share() -> None:
    """Areas above (1, 1): 1 x 1, then 1 x 1.05 or 1 x 1.2."""
    first = batch((2.0, 2.0), (1.0, 1.0))
    assert has_stalled([first, batch((2.0, 2.05), hours=2)], STOP)
    assert not has_stalled([first, batch((2.0, 2.2), hours=2)], STOP)


def test_stop_leaves_failures_out() -> None:
    assert not has_stalled([batch(None), batch((2.0, 2.0), (1.0, 1.0), hours=9)], STOP)
    assert not has_stalled([], STOP)


def test_stopped_exploration_has_fewer_points(tmp_path: Path) -> None:
    """Searches of the finished sweep take 110 s each, so four take 0.12 hours."""
    stop = ExploreStop(epsilon=10.0, gpu_hours=0.1)
    sweep, store = exploring(40, stop=stop), open_store(str(tmp_path))
    plan = finish(sweep, store).plan
    assert len(explored(plan)) == 8 and plan.complete


def test_stop_takes_nothing_back_that_was_proposed(tmp_path: Path) -> None:
    """By the new rule the first batch would have been the last."""
    store = open_store(str(tmp_path))
    finish(exploring(12), store)
    sweep = exploring(24, stop=ExploreStop(epsilon=10.0, gpu_hours=0.01))
    assert len(explored(plan_of(sweep, store))) == 12


@pytest.mark.parametrize(("gpus", "goes_on"), [(0.0, True), (1.0, True), (2.0, False)])
def test_stop_counts_hours_by_the_records_alone(gpus: float, goes_on: bool, tmp_path: Path) -> None:
    """A second batch: 400 s on these GPUs, of 0.2 GPU-hours without growth."""
    stop = ExploreStop(epsilon=10.0, gpu_hours=0.2)
    sweep, store = exploring(24, stop=stop), open_store(str(tmp_path))
    finish(sweep, store)
    records = {
        key: replace(record, host={"gpus": gpus}, timings={"seconds": 1.0})
        for key, record in store.records().items()
        if (record.kind, record.inputs.get("generation")) != ("explore", 2)
    }
    plan = build_plan(sweep, records, facts=sweep_facts(sweep), device="cpu")
    assert any(task.kind == "explore" for task in plan.ready) is goes_on
