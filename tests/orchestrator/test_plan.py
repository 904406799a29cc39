"""Plan: counts, sharing, resuming, resolution. Oracles: counting by hand, the core's functions."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.baselines import random_gates
from dipgo_core.outcome import SearchOutcome
from dipgo_core.postprocess import select
from orchestrator.facts import gather_facts
from orchestrator.model_tasks import ModelTasks, Way
from orchestrator.plan import Planner, build_plan
from orchestrator.planned import Plan
from orchestrator.records import Pool, Record, Task, content_key
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_settings import (
    AskedResources,
    Baseline,
    LatencySettings,
    Resources,
    SweepFile,
)
from tests.orchestrator.tiny_sweep import (
    ALL_BASELINES,
    GRAPH,
    item_set,
    tiny_facts,
    tiny_outputs,
    tiny_sweep,
)

Records = dict[str, Record]


def plan_of(sweep: SweepFile, records: Records | None = None, **kwargs: Any) -> Plan:
    return build_plan(sweep, records or {}, facts=tiny_facts(sweep), device="a cpu", **kwargs)


def record_of(task: Task) -> Record:
    return Record(
        key=task.key,
        kind=task.kind,
        state="done",
        inputs=task.inputs,
        outputs=tiny_outputs(task.kind, task.inputs),
    )


def test_order_of_metrics_decides_no_key() -> None:
    named = ("fid", "kid", "clip", "psnr", "latency")
    one, other = (tiny_sweep(metrics=metrics) for metrics in (named, named[::-1]))
    assert [task.key for task in plan_of(one).tasks] == [task.key for task in plan_of(other).tasks]


@pytest.mark.parametrize(("side", "same"), [(32, True), (64, False)])
def test_resolution_that_is_the_models_own_decides_no_key(side: int, same: bool) -> None:
    plain = tiny_sweep(baselines=ALL_BASELINES)
    (model,) = plain.models
    asked = replace(model, settings=replace(model.settings, resolution=side))
    told = replace(plain, models=(asked,))
    facts = {n: replace(f, height=side, width=side) for n, f in tiny_facts(told).items()}
    before = {task.key for task in plan_of(plain).tasks}
    after = build_plan(told, {}, facts=facts, device="a cpu").tasks
    assert all((task.key in before) == same for task in after)


def test_bundled_sweeps_keep_their_protocols(repository: Path) -> None:
    """Oracle: hashes in records that were made before the order of metrics was fixed."""
    sweep = load_sweep(repository / "sweeps" / "tiny_full.yaml")
    facts = gather_facts(sweep)
    tasks = [ModelTasks(sweep=sweep, model=m, facts=facts[m.name], device="") for m in sweep.models]
    assert [(t.protocols.top.hash[:8], t.protocols.calibration.hash[:8]) for t in tasks] == [
        ("35ad4ee1", "7d29617c"),
        ("45241734", "41f60071"),
    ]


def run_all(sweep: SweepFile, records: Records | None = None) -> tuple[Plan, Records, list[Task]]:
    """Plan and 'run' until nothing is ready; return what was run, too."""
    records, ran = dict(records or {}), []
    while ready := plan_of(sweep, records).ready:
        ran += ready
        records |= {task.key: record_of(task) for task in ready}
    return plan_of(sweep, records), records, ran


def kinds(tasks: Any) -> dict[str, int]:
    return dict(Counter(task.kind for task in tasks))


def test_plan_measures_latency_once_a_batch_size() -> None:
    sweep = replace(tiny_sweep(targets=(0.5,)), latency=LatencySettings(batch_size=(1, 8)))
    first, (last, _, ran) = plan_of(sweep), run_all(sweep)
    assert kinds(first.tasks)["latency"] == kinds(last.tasks)["latency"] == 2 * 2
    assert Counter(task.inputs["batch_size"] for task in ran if task.kind == "latency") == {
        1: 2,
        8: 2,
    }
    point = last.points[-1]
    assert len(point.throughput_keys) == 1
    assert {point.latency_key, *point.throughput_keys} <= set(point.task_keys)


def latency_keys(*prompts: str) -> list[str]:
    """Keys of latencies of one image and of two, of a sweep on these prompts."""
    sweep = replace(tiny_sweep(targets=(0.5,)), latency=LatencySettings(batch_size=(1, 2)))
    model = sweep.models[0]
    facts = replace(tiny_facts(sweep)[model.name], test=item_set(*prompts))
    made = ModelTasks(sweep=sweep, model=model, facts=facts, device="a cpu")
    way = Way(model.sampler, "block", ("1101",))
    return [task.key for task in made.latencies(way, "a point")]


def test_latency_is_keyed_on_the_prompts_that_it_shows() -> None:
    one, two = latency_keys("a red boot", "a blue shirt")
    assert latency_keys("a red boot", "a blue shirt", "a green coat") == [one, two]
    assert latency_keys("a red boot", "a green coat")[0] == one
    assert latency_keys("a red boot", "a green coat")[1] != two
    assert latency_keys("a green coat")[0] != one


def test_plan_counts_one_search_for_all_targets() -> None:
    targets = (0.3, 0.4, 0.5, 0.6, 0.7)
    summary = plan_of(tiny_sweep(targets=targets, alphas=(0.5, 1.0))).to_json()
    assert (summary["models"], summary["searches"], summary["evaluations"]) == (1, 2, 10)
    assert (summary["baselines"], summary["cached"]) == (0, 0)


def test_plan_lists_what_is_unresolved_with_the_search_it_needs() -> None:
    plan = plan_of(tiny_sweep(targets=(0.5,)))
    search = next(task for task in plan.tasks if task.kind == "search")
    waiting = [task for task in plan.tasks if task.kind == "evaluate" and search.key in task.needs]
    assert len(waiting) == 2  # on test and on calibration prompts
    assert {task.state for task in waiting} == {"unresolved"}
    assert [task.kind for task in plan.ready] == ["images", "images"]  # the dense runs


def test_reference_features_are_planned_once_and_evaluations_need_them() -> None:
    sweep = tiny_sweep(targets=(0.5,), baselines=ALL_BASELINES, metrics=("fid", "kid", "clip"))
    plan, _, _ = run_all(sweep)
    found = [task for task in plan.tasks if task.kind == "statistics"]
    users = [task.key for task in plan.tasks if found[0].key in task.needs]
    assert len(found) == 1
    assert found[0].needs == (plan.points[0].reference_key,)
    assert set(users) == {point.evaluate_key for point in plan.points}


def test_models_share_the_features_of_a_folder_and_a_file_needs_none() -> None:
    sweep = tiny_sweep(targets=(0.5,), models=("one", "two"), metrics=("kid", "clip"))
    for reference, count in ((f"folder:{'0' * 64}", 1), (f"statistics:{'0' * 64}", 0)):
        facts = {
            name: replace(fact, reference=reference) for name, fact in tiny_facts(sweep).items()
        }
        plan = build_plan(sweep, {}, facts=facts, device="a cpu")
        assert kinds(plan.tasks).get("statistics", 0) == count
        assert kinds(plan.ready)["images"] == 4


def test_plan_grows_no_task_it_had_not_counted() -> None:
    sweep = tiny_sweep(alphas=(0.5, 1.0), baselines=ALL_BASELINES)
    final, _, ran = run_all(sweep)
    first = kinds(plan_of(sweep).tasks)
    last = kinds(final.tasks)
    assert final.complete
    assert {**last, "images": first["images"]} == kinds(ran) | {"images": first["images"]}
    assert kinds(ran)["images"] <= first["images"] and "images" not in last
    # dense, 2 x 2 searched, few_steps x 2 x 2, uniform x 2, best_step_mask x 2, random x 2 x 2
    assert first["latency"] == 1 + 4 + 4 + 2 + 2 + 4
    assert last["latency"] <= first["latency"]
    assert (last["reference"], last["search"]) == (2, 2 + 2)  # step masks of both targets


def test_plan_of_a_finished_sweep_has_nothing_to_do() -> None:
    sweep = tiny_sweep(baselines=ALL_BASELINES)
    _, records, _ = run_all(sweep)
    again = plan_of(sweep, records)
    assert again.ready == ()
    assert again.to_json()["cached"] == len(again.tasks)
    assert all(point.evaluate_key and point.latency_key for point in again.points)


def test_adding_a_target_adds_only_its_points() -> None:
    _, records, _ = run_all(tiny_sweep(targets=(0.5, 0.7)))
    _, _, ran = run_all(tiny_sweep(targets=(0.3, 0.5, 0.7)), records)
    assert kinds(ran) == {"images": 2, "evaluate": 2, "latency": 1}  # evaluated on both splits


def test_adding_a_metric_keeps_references_and_searches() -> None:
    _, records, _ = run_all(tiny_sweep(metrics=("clip",)))
    _, _, ran = run_all(tiny_sweep(metrics=("clip", "psnr")), records)
    assert kinds(ran) == {"images": 2, "evaluate": 3}  # the dense run has no psnr


def test_identical_gates_share_one_evaluation() -> None:
    # at target 0.04 even 10 of 10 calls are needed: uniform computes everything, as dense does
    sweep = tiny_sweep(targets=(0.04,), baselines=[Baseline(name="uniform")])
    plan, _, _ = run_all(sweep)
    keys = {point.method: point.evaluate_key for point in plan.points}
    assert keys["uniform"] == keys["dense"]
    assert keys["search"] != keys["dense"]


def test_searched_gates_are_those_the_core_selects() -> None:
    plan, records, _ = run_all(tiny_sweep(targets=(0.5,)))
    point = next(point for point in plan.points if point.method == "search")
    outcome = SearchOutcome.from_json(records[str(point.search_key)].outputs["outcome"])
    assert point.keep == tuple(select(outcome, GRAPH, 0.5, num_calls=10).to_strings())


def test_random_draws_differ_and_are_those_of_the_core() -> None:
    sweep = tiny_sweep(targets=(0.5,), baselines=[Baseline(name="random", draws=2)])
    plan, _, _ = run_all(sweep)
    draws = [point.keep for point in plan.points if point.method == "random"]
    assert draws == [tuple(random_gates(GRAPH, 0.5, 10, seed).to_strings()) for seed in (0, 1)]
    assert draws[0] != draws[1]


def test_layers_and_blocks_share_the_dense_images_but_no_gates() -> None:
    sweep = tiny_sweep(targets=(0.5,), baselines=[Baseline(name="random", draws=1)])
    grid = sweep.models[0].grid
    object.__setattr__(grid, "axes", {**grid.axes, "granularity": ("block", "layer")})
    plan, records, _ = run_all(sweep)
    assert plan.complete and sum(record.kind == "reference" for record in records.values()) == 2
    searched = [point for point in plan.points if point.method == "search"]
    for point in (*searched, *(p for p in plan.points if p.method == "random")):
        record = records[str(point.evaluate_key)]
        assert record.inputs["granularity"] == point.granularity
    assert {point.granularity for point in searched} == {"block", "layer"}


def test_baselines_spend_at_least_the_compute_of_the_target() -> None:
    plan, _, _ = run_all(tiny_sweep(targets=(0.65,), baselines=ALL_BASELINES))
    for point in plan.points:
        if point.method in ("few_steps", "uniform", "best_step_mask"):
            assert point.keep is not None
            assert sum(row == "1111" for row in point.keep) == 4  # ceil(0.35 * 10)
            assert point.calibration_key


def test_few_steps_has_a_sampler_of_its_own_under_the_same_protocol() -> None:
    plan, records, _ = run_all(tiny_sweep(targets=(0.7,), baselines=ALL_BASELINES))
    points = {point.variant: point for point in plan.points if point.method == "few_steps"}
    assert set(points) == {"leading", "trailing"}
    for spacing, point in points.items():
        inputs = records[str(point.evaluate_key)].inputs
        assert inputs["sampler"]["steps"] == 3
        assert inputs["sampler"]["spacing"] == spacing
        assert inputs["protocol"]["sampler"]["steps"] == 10


def test_unreachable_target_fails_its_points_only() -> None:
    plan, _, _ = run_all(tiny_sweep(targets=(0.5, 0.95)))
    errors = {p.target: p.error for p in plan.points if p.method == "search"}
    assert "0.95" in str(errors[0.95])
    assert errors[0.5] is None
    assert plan.complete


def test_step_mask_searches_ignore_loss_weights() -> None:
    sweep = tiny_sweep(alphas=(0.5, 1.0), targets=(0.5,))
    grid = sweep.models[0].grid
    axes = {**grid.axes, "strategy": ("best_step_mask",)}
    object.__setattr__(grid, "axes", axes)
    assert plan_of(sweep).to_json()["searches"] == 1


def test_batch_size_and_names_do_not_change_keys() -> None:
    sweep = tiny_sweep()
    keys = {task.key for task in plan_of(sweep).tasks if task.state != "unresolved"}
    object.__setattr__(sweep.models[0].evaluate, "batch_size", 3)
    object.__setattr__(sweep, "name", "another")
    assert keys == {task.key for task in plan_of(sweep).tasks if task.state != "unresolved"}


def test_memo_gives_the_same_plan() -> None:
    sweep = tiny_sweep(baselines=ALL_BASELINES)
    plan, records, _ = run_all(sweep)
    memo: dict[str, Any] = {}
    assert plan_of(sweep, records, memo=memo) == plan
    assert plan_of(sweep, records, memo=memo) == plan
    assert set(memo) == {point.key for point in plan.points}


def test_models_are_planned_separately() -> None:
    plan, _, ran = run_all(tiny_sweep(models=("one", "two"), targets=(0.5,)))
    assert plan.complete
    assert kinds(ran) == {"images": 4 + 6, "reference": 4, "search": 2, "evaluate": 6, "latency": 4}


# --- shards -------------------------------------------------------------------------------------


def of_images(sweep: SweepFile, images: int, *, size: int = 500) -> SweepFile:
    (model,) = sweep.models
    model = replace(model, evaluate=replace(model.evaluate, images=images))
    resources = replace(sweep.resources, images_per_shard=size)
    return replace(sweep, models=(model,), resources=resources)


def ranges(tasks: Any) -> list[tuple[int, int]]:
    made = (t.inputs for t in tasks if t.kind == "images")
    return [
        (inputs["start"], inputs["stop"])
        for inputs in made
        if inputs["protocol"]["split"] == "test" and "keep" not in inputs
    ]


def test_runs_are_cut_into_shards_that_their_merge_needs_in_order() -> None:
    plan, records, ran = run_all(of_images(tiny_sweep(targets=(0.5,)), 10, size=4))
    assert ranges(ran) == [(0, 4), (4, 8), (8, 10)]
    for task in ran:
        shards = task.options.get("shards", ())
        assert set(shards) <= set(task.needs)
        split = task.inputs.get("protocol", {}).get("split")
        if task.kind in ("reference", "evaluate"):
            starts = [records[key].inputs["start"] for key in shards]
            assert starts == ([0, 4, 8] if split == "test" else list(range(0, 32, 4)))
    assert plan.complete


def test_shards_of_what_is_done_are_no_part_of_a_plan() -> None:
    plan, records, _ = run_all(tiny_sweep())
    assert "images" not in kinds(plan.tasks)
    lost = next(t.key for t in plan.tasks if t.kind == "evaluate")
    again = plan_of(tiny_sweep(), {k: r for k, r in records.items() if k != lost})
    assert [t.state for t in again.tasks if t.kind == "images"] == ["cached"]


def test_more_images_take_the_whole_shards_of_fewer() -> None:
    sweep = tiny_sweep(targets=(0.5,))
    _, records, _ = run_all(of_images(sweep, 10, size=4))
    _, _, ran = run_all(of_images(sweep, 14, size=4), records)
    assert ranges(ran) == [(8, 12), (12, 14)]
    assert "search" not in kinds(ran)


def test_dense_run_is_scored_by_what_needs_no_twin_and_features_are_made_once() -> None:
    sweep = tiny_sweep(targets=(0.5,), metrics=("fid", "clip", "psnr"))
    plan, _, ran = run_all(sweep)
    dense = next(point for point in plan.points if point.method == "dense")
    found = {
        tuple(t.inputs["keep"]) == dense.keep: (t.inputs["metrics"], set(t.inputs["scorers"]))
        for t in ran
        if t.kind == "images" and "keep" in t.inputs and t.inputs["protocol"]["split"] == "test"
    }
    assert found[True] == (["clip"], {"clip"})
    assert found[False] == (["clip", "psnr"], {"clip", "features"})


def test_what_loads_no_pipeline_waits_for_no_gpu() -> None:
    sweep = tiny_sweep(targets=(0.5,), metrics=("fid", "clip", "psnr"))
    gpu = AskedResources(cpus=2, gpus=1, accelerator="A100")
    sweep = replace(sweep, resources=Resources(reference=gpu, search=gpu, evaluate=gpu))
    _, _, ran = run_all(sweep)
    taken = {task.kind: task.pool for task in ran}
    for kind in ("images", "search", "statistics"):
        assert taken[kind] == Pool(2, 1, "A100")
    assert taken["reference"] == taken["evaluate"] == Pool(1, 0)


# --- planning again -----------------------------------------------------------------------------


def test_planner_plans_again_only_what_something_landed_of() -> None:
    sweep = tiny_sweep(models=("one", "two"), targets=(0.5,), baselines=ALL_BASELINES)
    planner = Planner(sweep, facts=tiny_facts(sweep), device="a cpu")
    records: Records = {}
    plan = planner.plan(records)
    while plan.ready:
        task = plan.ready[-1]
        records[task.key] = record_of(task)
        before = {t.key: t for t in plan.tasks}
        plan = planner.plan(records, changed=[task.key])
        other = [t for t in plan.tasks if t.model != before[task.key].model]
        assert all(t is before[t.key] for t in other)
        assert plan == plan_of(sweep, records)
    assert plan.complete


def test_planned_keys_are_those_of_the_inputs() -> None:
    """Oracle: the key worked out from the inputs alone."""
    _, _, ran = run_all(tiny_sweep(baselines=ALL_BASELINES, metrics=("fid", "clip", "latency")))
    assert len(ran) > 40
    for task in ran:
        assert task.key == content_key({"kind": task.kind, "inputs": task.inputs})


def test_importing_plan_imports_no_torch() -> None:
    code = "import sys, orchestrator.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
