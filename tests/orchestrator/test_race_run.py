"""Races as they run. Oracles: a direct evaluation at the top rung, records, arrays."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from dipgo_core.errors import TaskError
from dipgo_core.evaluation import evaluate
from orchestrator import driver
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.headlines import headlines
from orchestrator.pareto import pareto_fronts
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.sweep_settings import SweepFile
from orchestrator.sweep_tasks import RunResult
from orchestrator.task.race import run_race
from orchestrator.task.work import Work, loaded
from tests.orchestrator.finished_sweep import Finished, finish
from tests.orchestrator.test_task import sweep_of
from tests.orchestrator.tiny_sweep import (
    ALL_BASELINES,
    Listener,
    run,
    run_tiny_task,
    tiny_facts,
    tiny_sweep,
)
from tests.support.tiny import tiny_sd

# --- made-up figures, the driver's order of things --------------------------------------------


def a_sweep(**kwargs: Any) -> SweepFile:
    metrics = ("kid", "clip", "psnr", "latency")
    return tiny_sweep(rungs=(4, 8, 16), baselines=ALL_BASELINES, metrics=metrics, **kwargs)


def test_driver_holds_every_race(tmp_path: Path) -> None:
    result, listener = run(a_sweep(models=("one", "two")), open_store(tmp_path))
    assert result.plan.complete and not result.skipped
    done = [event.task for event in listener.events if event.kind == "done" and event.task]
    assert [task.kind for task in done].count("race") == 4
    for model in ("one", "two"):
        kinds = [task.kind for task in done if task.label.startswith(model)]
        last_latency = max(i for i, kind in enumerate(kinds) if kind == "latency")
        assert kinds[last_latency + 1] == "race"


def test_driver_again_computes_nothing(tmp_path: Path) -> None:
    run(a_sweep(), open_store(tmp_path))
    again, _ = run(a_sweep(), open_store(tmp_path))
    assert again.done == () and again.plan.complete


def test_driver_runs_to_the_top_again_what_a_new_race_lets_go_on(tmp_path: Path) -> None:
    run(a_sweep(targets=(0.5, 0.7)), open_store(tmp_path))
    more, _ = run(a_sweep(targets=(0.3, 0.5, 0.7)), open_store(tmp_path))
    assert more.plan.complete and not more.skipped


def test_driver_races_what_an_earlier_run_evaluated_at_the_top(tmp_path: Path) -> None:
    sweep = a_sweep()
    model = sweep.models[0]
    plain = replace(model, evaluate=replace(model.evaluate, rungs=()))
    run(replace(sweep, models=(plain,)), open_store(tmp_path))
    result, _ = run(sweep, open_store(tmp_path))
    assert result.plan.complete and not result.skipped


@pytest.mark.parametrize("kind", ["search", "latency", "evaluate", "race"])
def test_driver_ends_whatever_fails(tmp_path: Path, kind: str) -> None:
    failures: list[str] = []

    def failing(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        first = task.kind == kind and not failures
        if first and (kind != "evaluate" or task.inputs["protocol"]["images"] == 8):
            failures.append(task.key)
            raise RuntimeError("out of luck")
        return run_tiny_task(task, store)

    store = open_store(tmp_path)
    result, _ = run(a_sweep(targets=(0.5,)), store, failing)
    assert set(result.failed) == set(failures) and len(failures) == 1
    points = resolve_points(result.plan.points, store.records(), store)
    states = {point.state for point in points}
    assert states == ({"failed"} if kind == "race" else {"done", "failed", "dropped"})
    again, _ = run(a_sweep(targets=(0.5,)), store)
    assert again.plan.complete and not again.failed


def test_plan_sweep_knows_what_failed_at_every_rung(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed: dict[int, str] = {}

    def failing(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        protocol = task.inputs.get("protocol", {})
        scored = task.kind == "evaluate" and protocol["split"] == "test"
        if scored and failed.setdefault(protocol["images"], task.key) == task.key:
            raise RuntimeError("out of luck")
        return run_tiny_task(task, store)

    sweep, store = a_sweep(), open_store(tmp_path)
    result, _ = run(sweep, store, failing)
    assert set(failed) == {4, 8, 16} and set(result.failed) == set(failed.values())
    monkeypatch.setattr(driver, "as_last_run", lambda *args: (sweep, tiny_facts(sweep)))
    assert driver.plan_sweep(sweep, store).points == result.plan.points


def made_up_results(folder: str) -> Any:
    """A task function for other processes; a closure, so that they get it by value."""

    def run_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        import sys

        sys.path.insert(0, folder)
        from tiny_sweep import run_tiny_task

        done: Record = run_tiny_task(task, store)
        return done

    return run_task


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_holds_every_race(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    from orchestrator.executors.ray_tune.run import RayTuneExecutor

    sweep, store, listener = a_sweep(targets=(0.5,)), open_store(tmp_path), Listener()
    result = run_sweep(
        sweep,
        store,
        RayTuneExecutor(num_cpus=2),
        listener,
        run_task=made_up_results(str(Path(__file__).parent)),
        facts=tiny_facts(sweep),
    )
    assert result.plan.complete and not result.skipped
    assert [record.kind for record in store.records().values()].count("race") == 2


# --- made-up arrays, decided for real ---------------------------------------------------------


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(made_up(rungs=(64, 256)), open_store(tmp_path_factory.mktemp("store")))


def made_up(rungs: tuple[int, ...]) -> SweepFile:
    metrics = ("fid", "kid", "clip", "psnr", "ssim", "latency")
    sweep = tiny_sweep(
        targets=(0.5, 0.7), alphas=(0.5, 1.0), baselines=ALL_BASELINES, metrics=metrics, rungs=rungs
    )
    return replace(sweep, objective=replace(sweep.objective, speed="macs"))


@pytest.fixture(scope="module")
def points(raced: Finished) -> tuple[ResolvedPoint, ...]:
    return resolve_points(raced.plan.points, raced.store.records(), raced.store)


def lost(points: tuple[ResolvedPoint, ...]) -> list[ResolvedPoint]:
    return [point for point in points if point.state == "dropped"]


def test_dropped_point_names_who_beats_it(points: tuple[ResolvedPoint, ...]) -> None:
    by_key = {point.key: point for point in points}
    assert lost(points)
    for point in lost(points):
        assert point.dropped and point.n_images == point.dropped.images == 64
        assert set(point.dropped.by) == {"kid", "clip", "psnr", "ssim"}
        for winner in (by_key[key] for key in point.dropped.by.values()):
            assert winner.state == "done" and winner.n_images == 256
            assert winner.macs and point.macs and winner.macs <= point.macs
        assert point.to_json()["dropped"]["images"] == 64
        assert "fid" not in point.figures


def test_dropped_points_are_on_no_front(points: tuple[ResolvedPoint, ...]) -> None:
    fronts = pareto_fronts(points, speed="macs_speedup")
    assert fronts
    compared = {key for front in fronts for key in front.standing}
    assert not compared & {point.key for point in lost(points)}


def test_fronts_are_those_of_everything_at_the_top(
    points: tuple[ResolvedPoint, ...], tmp_path: Path
) -> None:
    done = finish(made_up(rungs=(256,)), open_store(tmp_path))
    everything = resolve_points(done.plan.points, done.store.records(), done.store)
    expected = {f.objectives: f.points for f in pareto_fronts(everything, speed="macs_speedup")}
    found = {f.objectives: f.points for f in pareto_fronts(points, speed="macs_speedup")}
    assert {o: k for o, k in found.items() if o[1] != "fid"} == {
        o: k for o, k in expected.items() if o[1] != "fid"
    }


def test_every_target_keeps_its_headline(points: tuple[ResolvedPoint, ...]) -> None:
    # the choice is by calibration, so a race, which looks at test images, must not narrow it
    found = {line.target: line for line in headlines(points, "psnr")}
    searched = [point for point in points if point.is_searched]
    assert set(found) == {0.5, 0.7}
    for target, line in found.items():
        assert line.candidates == sum(point.target == target for point in searched)


def test_gains_of_unequal_n_are_over_the_first_images(
    raced: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    by_key = {point.key: point for point in points}
    searched = [point for point in points if point.is_searched and point.gain_random]
    assert searched
    for point in searched:
        gain = point.gain_random["psnr"]
        draws = [by_key[key] for key in gain.baseline_key.split(",")]
        n = min(each.n_images or 0 for each in (point, *draws))
        assert gain.n == n
        ours, *theirs = (psnr(raced, each)[:n] for each in (point, *draws))
        assert gain.value == pytest.approx((ours - np.mean(theirs, axis=0)).mean())
        assert ("fid" in point.gain_random) == (len({e.n_images for e in (point, *draws)}) == 1
                                                and point.n_images == 256)  # fmt: skip


def psnr(raced: Finished, point: ResolvedPoint) -> Any:
    record = raced.store.records()[point.evaluate_key or ""]
    return arrays(raced.store, record, "per_image.safetensors")["psnr"]


def race_of(raced: Finished) -> Task:
    return next(each.task for each in raced.plan.tasks if each.kind == "race" and each.task)


def without(raced: Finished, kind: str, place: Path) -> Work:
    """The race again, in a copy of the store that lost what tasks of a kind have left."""
    shutil.copytree(raced.store.folder, place, ignore=shutil.ignore_patterns("derived"))
    for record in raced.store.records().values():
        if record.kind == kind:
            shutil.rmtree(place / "artifacts" / record.key)
    return Work(race_of(raced), open_store(place), lambda report: None)


def test_race_fails_where_its_reference_cannot_be_read(raced: Finished, tmp_path: Path) -> None:
    work = without(raced, "statistics", tmp_path / "store")
    with pytest.raises(TaskError, match=r"race at 64 images: kid of .* cannot be resampled \(\w+"):
        run_race(work)


def test_race_of_too_few_images_fails(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="kid of .* too few images"):
        finish(made_up(rungs=(4, 256)), open_store(tmp_path))


# --- real images --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tiny_sd().save_pretrained(root / "model")
    (root / "test.txt").write_text("\n".join(f"dog {i}" for i in range(16)))
    (root / "calibration.txt").write_text("the moon\na red moon\n")
    return root


def real_sweep(folder: Path, rungs: tuple[int, ...]) -> SweepFile:
    sweep = sweep_of(folder)
    model = sweep.models[0]
    evaluate = replace(
        model.evaluate,
        images=rungs[-1],
        rungs=rungs if len(rungs) > 1 else (),
        metrics=("fid", "kid", "psnr", "ssim"),
        race=("kid", "psnr", "ssim") if len(rungs) > 1 else (),
        batch_size=4,
        reference=replace(model.evaluate.reference, kind="dense"),
    )
    few = [baseline for baseline in model.baselines if baseline.name != "best_step_mask"]
    return replace(
        sweep, models=(replace(model, evaluate=evaluate, baselines=tuple(few)),),
        resources=replace(sweep.resources, images_per_shard=4),
    )  # fmt: skip


def run_real(sweep: SweepFile, place: Path) -> tuple[Store, RunResult]:
    store = open_store(place)
    loaded.cache_clear()
    result = run_sweep(sweep, store, InProcessExecutor(), Listener())
    assert result.plan.complete, result.failed
    return store, result


def counting(made: Counter[Any]) -> Any:
    """Generate images, counting each by its run and its seed."""
    real = evaluate.generate

    def generate(model: Any, items: Any, seeds: Any, sampler: Any, **options: Any) -> Any:
        gates = options.get("gates")
        for seed in seeds:
            made[str(sampler), gates and gates.digest, seed] += 1
        return real(model, items, seeds, sampler, **options)

    return generate


def arrays(store: Store, record: Record, name: str) -> Mapping[str, Any]:
    return safetensors.numpy.load(store.get_artifact(record, name))


def test_top_rung_equals_a_direct_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rungs of 8 and 16 have the batches of a direct evaluation: they are multiples of 4
    made = Counter[Any]()
    monkeypatch.setattr(evaluate, "generate", counting(made))
    store, result = run_real(real_sweep(folder, (8, 16)), tmp_path / "raced")
    monkeypatch.undo()
    direct, plain = run_real(real_sweep(folder, (16,)), tmp_path / "direct")
    assert set(made.values()) == {1}  # no image twice, whatever rung it was made for
    kept = {point.evaluate_key for point in result.plan.points if point.dropped is None}
    assert kept and kept <= {point.evaluate_key for point in plain.plan.points}
    for key in kept:
        ours, theirs = (s.records()[str(key)] for s in (store, direct))
        assert ours.artifacts == theirs.artifacts  # digests: the same scores, features and samples
        for name in ("metrics", "forwards", "n_images", "macs"):
            assert ours.outputs[name] == theirs.outputs[name]
