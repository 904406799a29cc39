"""Races in a plan. Oracles: counting by hand, the plan without a race, the calibration records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.plan import build_plan
from orchestrator.planned import Plan, Point
from orchestrator.records import Record, Task, content_key
from orchestrator.sweep_settings import Objective, SweepFile
from tests.orchestrator.tiny_sweep import ALL_BASELINES, tiny_facts, tiny_outputs, tiny_sweep

Records = dict[str, Record]
METRICS = ("fid", "kid", "clip", "psnr", "latency")


def a_sweep(*, rungs: tuple[int, ...] = (4, 8, 16), **kwargs: Any) -> SweepFile:
    return tiny_sweep(rungs=rungs, metrics=METRICS, baselines=ALL_BASELINES, **kwargs)


def plan_of(sweep: SweepFile, records: Records, failed: tuple[str, ...] = ()) -> Plan:
    facts = tiny_facts(sweep)
    return build_plan(sweep, records, facts=facts, device="a cpu", failed=failed)


def record_of(task: Task) -> Record:
    outputs = tiny_outputs(task.kind, task.inputs)
    return Record(key=task.key, kind=task.kind, state="done", inputs=task.inputs, outputs=outputs)


def run_all(
    sweep: SweepFile, records: Records | None = None, failing: Callable[[Task], bool] | None = None
) -> tuple[Plan, Records, list[Task]]:
    """Plan and 'run' until nothing is ready; tasks that are `failing` fail."""
    fails = failing or (lambda task: False)
    records, ran, failed = dict(records or {}), list[Task](), list[str]()
    while True:
        plan = plan_of(sweep, records, tuple(failed))
        ready = [task for task in plan.ready if task.key not in failed]
        if not ready:
            return plan, records, ran
        failed += [task.key for task in ready if fails(task)]
        done = [task for task in ready if not fails(task)]
        ran += done
        records |= {task.key: record_of(task) for task in done}


def is_search(task: Task) -> bool:
    return task.kind == "search"


def evaluations(tasks: list[Task], split: str = "test") -> list[Task]:
    return [
        task for task in tasks
        if task.kind == "evaluate" and task.inputs["protocol"]["split"] == split
    ]  # fmt: skip


def dropped(plan: Plan) -> list[Point]:
    return [point for point in plan.points if point.dropped is not None]


@pytest.fixture(scope="module")
def raced() -> tuple[Plan, Records, list[Task]]:
    return run_all(a_sweep())


Raced = tuple[Plan, Records, list[Task]]


def test_race_is_listed_before_anything_is_known() -> None:
    plan = plan_of(a_sweep(), {})
    races = [task for task in plan.tasks if task.kind == "race"]
    assert [task.label for task in races] == ["tiny: race at 4 images", "tiny: race at 8 images"]
    assert {task.state for task in races} == {"unresolved"}


def test_every_point_is_measured_at_the_lowest_rung_before_the_race(raced: Raced) -> None:
    plan, _, ran = raced
    first_race = next(i for i, task in enumerate(ran) if task.kind == "race")
    images = Counter(t.inputs["protocol"]["images"] for t in evaluations(ran[:first_race]))
    assert images == {4: len({p.lower_keys[0] if p.lower_keys else p.evaluate_key
                              for p in plan.points})}  # fmt: skip
    latencies = [i for i, task in enumerate(ran) if task.kind == "latency"]
    assert max(latencies) < first_race


def test_race_ends_with_everything_done(raced: Raced) -> None:
    plan, records, _ = raced
    assert plan.complete
    assert len([record for record in records.values() if record.kind == "race"]) == 2
    assert {point.dropped.images for point in dropped(plan) if point.dropped} == {4, 8}


def test_dropped_point_has_no_evaluation_above_its_rung(raced: Raced) -> None:
    plan, records, _ = raced
    for point in dropped(plan):
        assert point.dropped and point.evaluate_key and point.images == point.dropped.images
        assert records[point.evaluate_key].inputs["protocol"]["images"] == point.images
        same = [t for t in evaluations([record_task(r) for r in records.values()])
                if t.inputs["keep"] == list(point.keep or ())
                and t.inputs["sampler"] == point.sampler]  # fmt: skip
        assert max(task.inputs["protocol"]["images"] for task in same) == point.images
        assert set(point.dropped.by) == {"kid", "clip", "psnr"}


def record_task(record: Record) -> Task:
    return Task(kind=record.kind, inputs=record.inputs)


def test_kept_points_have_the_evaluations_of_a_plan_without_a_race(raced: Raced) -> None:
    plain, _, _ = run_all(a_sweep(rungs=()))
    top = {point.key: point.evaluate_key for point in plain.points}
    kept = [point for point in raced[0].points if point.dropped is None]
    assert {point.key: point.evaluate_key for point in kept}.items() <= top.items()
    assert len(kept) == len(top) - 2


def test_higher_rung_takes_the_shards_of_the_lower_one(raced: Raced) -> None:
    plan, _, ran = raced
    by_key = {task.key: task for task in ran}
    for point in plan.points:
        for lower, higher in zip(point.lower_keys, point.evaluate_keys[1:], strict=True):
            task, below = by_key[higher], by_key[lower].options["shards"]
            assert task.options["shards"][: len(below)] == below
            assert set(below) < set(task.needs) and task.needs[0] == point.reference_key


def images_made(tasks: list[Task]) -> Counter[tuple[str, int]]:
    """How often each image of each run was made."""
    return Counter(
        (content_key([t.inputs["sampler"], t.inputs.get("keep"), t.inputs["protocol"]]), image)
        for t in tasks
        if t.kind == "images"
        for image in range(t.inputs["start"], t.inputs["stop"])
    )


def test_no_image_is_made_twice(raced: Raced) -> None:
    made = images_made(raced[2])
    assert set(made.values()) == {1}
    assert {image for _, image in made} >= set(range(16))


def test_lower_rungs_measure_no_fid(raced: Raced) -> None:
    for task in evaluations(raced[2]):
        protocol = task.inputs["protocol"]
        assert ("fid" in protocol["metrics"]) == (protocol["images"] == 16)
        assert protocol["kid_subset_size"] == protocol["images"] // 2


def test_race_again_has_nothing_to_do(raced: Raced) -> None:
    assert plan_of(a_sweep(), raced[1]).ready == ()


def test_adding_a_target_pays_only_for_new_images(raced: Raced) -> None:
    _, records, _ = raced
    plan, _, ran = run_all(a_sweep(targets=(0.3, 0.5, 0.7)), records)
    assert plan.complete
    kinds = {"images", "evaluate", "latency", "race"}
    assert {task.kind for task in ran} == kinds | {"search"}  # the step masks of the new target
    # what was dropped before the new target came may go on now; it goes on from what it has
    known = {key for key, record in records.items() if record.kind == "evaluate"}
    assert not {task.key for task in ran} & known
    assert max(images_made(raced[2] + ran).values()) == 1


def test_dense_run_is_protected_and_bars_go_with_their_points(raced: Raced) -> None:
    plan, records, ran = raced
    race = next(task for task in ran if task.kind == "race")
    by_key = {c["key"]: c for c in race.inputs["candidates"]}
    first = {point.key: point.evaluate_keys[0] for point in plan.points}
    for point in plan.points:
        candidate = by_key[first[point.key]]
        assert candidate["protected"] == (point.method == "dense")
        if point.method != "search":
            continue
        rivals = [p for p in plan.points if p.target == point.target and p.method in TRIVIAL]
        scores = {p.key: records[str(p.calibration_key)].outputs["metrics"]["psnr"]["value"]
                  for p in rivals}  # fmt: skip
        assert first[max(scores, key=lambda key: scores[key])] in candidate["bars"]


TRIVIAL = ("few_steps", "uniform", "best_step_mask")


def test_race_waits_for_what_may_still_come_and_not_for_what_failed() -> None:
    sweep = a_sweep(rungs=(4, 16))
    plan, records, ran = run_all(sweep, failing=is_search)
    races = [task for task in ran if task.kind == "race"]
    assert len(races) == 1
    searched = {p.key for p in plan.points if p.method in ("search", "best_step_mask")}
    left_out = {p.key for p in plan.points if not p.race_keys}
    assert left_out == searched
    assert all(p.images == 16 or p.dropped for p in plan.points if p.key not in left_out)
    waiting = plan_of(sweep, records)  # nothing has failed in this run yet
    assert [task.state for task in waiting.tasks if task.kind == "race"] == ["unresolved"]


def test_race_is_held_again_when_what_failed_succeeds() -> None:
    sweep = a_sweep(rungs=(4, 16))
    _, records, _ = run_all(sweep, failing=is_search)
    plan, after, _ = run_all(sweep, records)
    assert plan.complete
    assert len([record for record in after.values() if record.kind == "race"]) == 2


@pytest.mark.parametrize(
    ("quality", "raced"), [("clip", ["clip"]), ("fid", ["kid"]), ("ssim", ["psnr", "kid", "clip"])]
)
def test_race_keeps_the_front_of_the_objective_unless_told(quality: Any, raced: list[str]) -> None:
    sweep = a_sweep()  # ssim is not among its metrics
    model = sweep.models[0]
    evaluate = replace(model.evaluate, race=(), metrics=("psnr", "fid", "kid", "clip"))
    sweep = replace(sweep, models=(replace(model, evaluate=evaluate),))

    _, _, ran = run_all(replace(sweep, objective=Objective(speed="macs", quality=quality)))

    races = [task.inputs["metrics"] for task in ran if task.kind == "race"]
    assert races and all(sorted(metrics) == sorted(raced) for metrics in races)


def test_speed_of_a_race_is_that_of_the_fronts() -> None:
    for metrics in (METRICS, tuple(metric for metric in METRICS if metric != "latency")):
        sweep = tiny_sweep(rungs=(4, 16), metrics=metrics, targets=(0.5,))
        _, records, ran = run_all(sweep)
        race = next(task for task in ran if task.kind == "race")
        speeds = [c["speed"] for c in race.inputs["candidates"]]
        macs = [records[c["key"]].outputs["macs"]["kept"] for c in race.inputs["candidates"]]
        expected = [1000 / kept if "latency" in metrics else -kept for kept in macs]
        assert speeds == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("size", [1, 64])
def test_failed_latencies_hold_up_no_race(size: int) -> None:
    sweep = a_sweep(rungs=(4, 16))
    sweep = replace(sweep, latency=replace(sweep.latency, batch_size=(1, 64)))
    plan, _, ran = run_all(
        sweep, failing=lambda task: task.kind == "latency" and task.inputs["batch_size"] == size
    )
    race = next(task for task in ran if task.kind == "race")
    assert all((c["speed"] is None) == (size == 1) for c in race.inputs["candidates"])
    assert all(point.images == 16 for point in plan.points if point.dropped is None)
    assert bool(dropped(plan)) == (size != 1)


def test_race_by_counted_speed_waits_for_no_latency() -> None:
    sweep = a_sweep(rungs=(4, 16))
    by_macs = replace(sweep, objective=replace(sweep.objective, speed="macs"))
    plan, _, _ = run_all(by_macs, failing=lambda task: task.kind == "latency")
    assert dropped(plan)
    assert all(point.images == 16 for point in plan.points if point.dropped is None)


def test_speed_of_a_race_has_the_interval_of_its_measurement(raced: Raced) -> None:
    plan, records, ran = raced
    race = next(task for task in ran if task.kind == "race")
    timed = {p.evaluate_keys[0]: records[str(p.latency_key)].outputs for p in plan.points}
    for candidate in race.inputs["candidates"]:
        speed = timed[candidate["key"]]["speedup"]
        assert (candidate["speed_low"], candidate["speed_high"]) == (speed["low"], speed["high"])


def test_race_looks_at_the_metrics_that_were_asked_for() -> None:
    sweep = a_sweep(rungs=(4, 16))
    model = sweep.models[0]
    some = replace(model, evaluate=replace(model.evaluate, race=("psnr",)))
    _, _, ran = run_all(replace(sweep, models=(some,)))
    race = next(task for task in ran if task.kind == "race")
    assert race.inputs["metrics"] == ["psnr"]
    assert all("clip" in task.inputs["protocol"]["metrics"] for task in evaluations(ran))


def test_everything_at_the_top_is_not_made_again_for_a_race() -> None:
    _, records, _ = run_all(a_sweep(rungs=()))
    _, _, ran = run_all(a_sweep(rungs=(4, 16)), records)
    assert {task.kind for task in ran} == {"evaluate", "race"}
    for task in evaluations(ran):
        (shard,) = task.options["shards"]
        assert task.inputs["protocol"]["images"] == 4 and records[shard].inputs["stop"] == 16


def test_one_number_of_images_makes_no_race() -> None:
    plan, _, ran = run_all(a_sweep(rungs=()))
    assert "race" not in {task.kind for task in ran}
    assert {point.images for point in plan.points} == {16}
