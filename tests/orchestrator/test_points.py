"""Points of a made-up finished sweep. Oracles: the records' own arrays, numpy, scipy."""

import json
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load
from scipy.linalg import sqrtm

from dipgo_core.errors import StoreError
from dipgo_core.evaluation.fid_intervals import fid_replicates
from dipgo_core.evaluation.intervals import difference_of, interval_of
from dipgo_core.evaluation.mmd_intervals import kid_replicates
from dipgo_core.evaluation.protocol import Protocol
from orchestrator.export import export_subnet
from orchestrator.figures import mark_of
from orchestrator.gains import DISTRIBUTIONS, Comparisons, Gain
from orchestrator.headlines import headlines, statements
from orchestrator.methods import TRIVIAL, Method
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.records import Record
from orchestrator.report.front_svg import SHAPES, shape_of
from orchestrator.search_cost import SearchCost, search_cost
from orchestrator.store import open_store
from orchestrator.sweep_settings import SweepFile
from tests.orchestrator.finished_sweep import Finished, finish, sweep_facts
from tests.orchestrator.tiny_sweep import ALL_BASELINES, tiny_sweep

Floats = npt.NDArray[np.float64]
TARGETS = (0.5, 0.7)


def a_sweep(images: int = 64) -> SweepFile:
    sweep = tiny_sweep(
        targets=TARGETS,
        alphas=(0.5, 1.0),
        baselines=ALL_BASELINES,
        metrics=("fid", "kid", "clip", "psnr", "ssim", "latency"),
    )
    evaluate = replace(sweep.models[0].evaluate, images=images)
    return replace(sweep, models=(replace(sweep.models[0], evaluate=evaluate),))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return finish(a_sweep(), open_store(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def points(finished: Finished) -> tuple[ResolvedPoint, ...]:
    return resolve_points(finished.plan.points, finished.store.records(), finished.store)


def a_record(key: str, inputs: dict[str, Any], outputs: dict[str, Any]) -> Record:
    return Record(key=key, kind="search", state="done", inputs=inputs, outputs=outputs)


def pick(points: tuple[ResolvedPoint, ...], method: str, target: float) -> list[ResolvedPoint]:
    return [p for p in points if p.method == method and p.target == target]


def scores(finished: Finished, point: ResolvedPoint, metric: str) -> Floats:
    record = finished.store.records()[point.evaluate_key or ""]
    values: Floats = load(finished.store.get_artifact(record, "per_image.safetensors"))[metric]
    return values


def test_points_are_done_and_serialise(points: tuple[ResolvedPoint, ...]) -> None:
    assert {point.state for point in points} == {"done"}
    assert len(json.dumps([point.to_json() for point in points], allow_nan=False)) > 1000


def test_every_figure_carries_the_protocol_it_was_measured_under(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    for point in points:
        record = finished.store.records()[point.evaluate_key or ""]
        expected = Protocol.from_json(record.inputs["protocol"]).hash
        assert {figure.protocol for figure in point.figures.values()} == {expected}
        assert point.to_json()["figures"]["clip"]["protocol"] == expected


def test_few_steps_are_counted_against_the_dense_run(points: tuple[ResolvedPoint, ...]) -> None:
    for point in pick(points, "few_steps", 0.7):
        assert point.macs_speedup == pytest.approx(10 / 3)
        assert point.pruned_ratio == pytest.approx(0.7)


def test_dense_run_that_was_disturbed_is_timed_by_its_siblings_and_says_why(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    records = dict(finished.store.records())
    key = next(point.latency_key for point in points if point.method == "dense")
    assert key is not None
    siblings = [r for r in records.values() if r.kind == "latency" and r.key != key]
    for i, record in enumerate(siblings):
        timed = {**record.outputs["dense_latency_ms"], "value": 40.0 + i**2}
        outputs = {**record.outputs, "dense_latency_ms": timed}
        records[record.key] = replace(record, outputs=outputs)
    spoilt = {**records[key].outputs, "usable": False, "disturbed": "a busy GPU"}
    records[key] = replace(records[key], outputs=spoilt)

    found = resolve_points(finished.plan.points, records, finished.store)
    dense = next(point for point in found if point.method == "dense")

    assert (dense.speedup, dense.latency_usable) == (1.0, True)
    assert dense.latency_ms == np.median([40 + i**2 for i in range(len(siblings))])
    assert str(dense.latency_note).endswith("its own measurement: batch 1: a busy GPU")


@pytest.mark.parametrize("target", TARGETS)
def test_baseline_is_the_best_on_calibration_prompts(
    points: tuple[ResolvedPoint, ...], target: float
) -> None:
    rivals = [
        p for m in ("few_steps", "uniform", "best_step_mask") for p in pick(points, m, target)
    ]
    for metric, figure in (("clip", "clip"), ("ssim", "ssim"), ("psnr", "psnr"), ("fid", "psnr")):
        scores = {rival.key: getattr(rival, f"calibration_{figure}") for rival in rivals}
        chosen = {p.gain[metric].baseline_key for p in points if p.target == target}
        assert len(chosen) == 1
        assert scores[chosen.pop()] == max(scores.values())


@pytest.mark.parametrize("metric", ["clip", "psnr", "ssim"])
def test_gain_is_the_mean_paired_difference(
    finished: Finished, points: tuple[ResolvedPoint, ...], metric: str
) -> None:
    point = pick(points, "search", 0.7)[0]
    gain = point.gain[metric]
    baseline = next(p for p in points if p.key == gain.baseline_key)
    difference = scores(finished, point, metric) - scores(finished, baseline, metric)
    assert gain.value == pytest.approx(difference.mean())
    assert gain.low is not None and gain.high is not None
    assert gain.low < gain.value < gain.high
    assert gain.high - gain.low < 8 * difference.std() / np.sqrt(len(difference))


def test_gain_in_fid_is_positive_where_fid_is_lower(points: tuple[ResolvedPoint, ...]) -> None:
    for point in points:
        if "fid" not in point.gain:
            continue
        baseline = next(p for p in points if p.key == point.gain["fid"].baseline_key)
        expected = baseline.figures["fid"].value - point.figures["fid"].value
        assert point.gain["fid"].value == pytest.approx(expected)


def test_same_subnet_gains_exactly_nothing(points: tuple[ResolvedPoint, ...]) -> None:
    baseline_key = pick(points, "search", 0.5)[0].gain["clip"].baseline_key
    baseline = next(p for p in points if p.key == baseline_key)
    nothing = Gain(value=0.0, low=0.0, high=0.0, baseline_key=baseline_key, n=64)
    assert baseline.gain["psnr"] == nothing
    assert baseline.verdicts["psnr"] == "ties"


def test_gain_over_random_is_over_the_mean_of_draws(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    point, draws = pick(points, "search", 0.7)[0], pick(points, "random", 0.7)
    mean = np.mean([scores(finished, draw, "clip") for draw in draws], axis=0)
    expected = (scores(finished, point, "clip") - mean).mean()
    assert point.gain_random["clip"].value == pytest.approx(expected)
    assert point.gain_random["clip"].baseline_key == ",".join(sorted(d.key for d in draws))


@pytest.mark.parametrize("target", TARGETS)
def test_gain_over_each_baseline_is_the_mean_paired_difference(
    finished: Finished, points: tuple[ResolvedPoint, ...], target: float
) -> None:
    point = pick(points, "search", target)[0]
    rivals = [p for p in points if p.method in TRIVIAL and p.target == target]
    assert set(point.gain_over) == {rival.key for rival in rivals} and len(rivals) >= 4
    for rival in rivals:
        expected = scores(finished, point, "psnr") - scores(finished, rival, "psnr")
        assert point.gain_over[rival.key]["psnr"].value == pytest.approx(expected.mean())
    best = point.gain["psnr"]
    assert point.gain_over[best.baseline_key]["psnr"] == best
    told = point.to_json()["gain_over"][best.baseline_key]["psnr"]
    assert told == {**asdict(best), "verdict": best.verdict}


def test_only_searched_points_are_compared_with_each_baseline(
    points: tuple[ResolvedPoint, ...],
) -> None:
    assert {p.method for p in points if p.gain_over} == {"search"}


def test_search_cost_is_what_its_record_says(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    costs = {p.method: p.search_cost for p in points}
    known = SearchCost(forwards=400, sample_forwards=400.0, seconds=100.0)
    assert costs["search"] == costs["best_step_mask"] == known
    assert costs["uniform"] is None and costs["dense"] is None


def test_search_cost_names_what_it_began_with_apart() -> None:
    records = {
        "e": a_record("e", {}, {"forwards": 9, "sample_forwards": 90.0, "seconds": 5.0}),
        "s": a_record("s", {"errors": "e", "step_masks": "gone"}, {"forwards": 20}),
    }
    found = search_cost(records["s"], records)
    assert found is not None and found.seconds is None
    assert found.text == "20 batches (+ errors: 90 forwards, 5 s)"


def test_no_gain_in_fid_has_an_interval_with_few_images(tmp_path: Path) -> None:
    sweep = a_sweep(images=24)  # fewer than 4 x 8 features, fewer prompts than blocks
    store = open_store(tmp_path)
    plan = finish(sweep, store).plan
    found = resolve_points(plan.points, store.records(), store)
    assert {p.gain["fid"].verdict for p in pick(found, "search", 0.7)} == {"unknown"}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.1, 0.3, "beats"), (-0.1, 0.3, "ties"), (-0.3, -0.1, "loses"), (None, None, "unknown")],
)
def test_verdict_is_what_the_interval_excludes(
    low: float | None, high: float | None, expected: str
) -> None:
    assert Gain(value=0.1, low=low, high=high, baseline_key="b", n=16).verdict == expected


def test_unfinished_baseline_leaves_the_gain_open(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    uniform = pick(points, "uniform", 0.7)[0]
    records = {k: r for k, r in finished.store.records().items() if k != uniform.evaluate_key}
    found = resolve_points(finished.plan.points, records, finished.store)
    assert pick(found, "uniform", 0.7)[0].state == "pending"
    shares = [p for p in pick(found, "search", 0.7) if p.evaluate_key in records]
    assert shares and all(not point.gain for point in shares)
    assert all(point.gain for point in pick(found, "search", 0.5))


def test_failed_task_fails_its_points_with_the_cause(tmp_path: Path) -> None:
    done = finish(
        a_sweep(), open_store(tmp_path), fails=lambda task: "uniform at 0.7" in task.label
    )
    found = resolve_points(done.plan.points, done.store.records(), done.store)
    uniform = pick(found, "uniform", 0.7)[0]
    assert (uniform.state, "out of memory" in str(uniform.error)) == ("failed", True)
    assert not any(point.gain for point in pick(found, "search", 0.7))  # the bar is incomplete
    assert all(point.gain for point in pick(found, "search", 0.5))


def test_headline_is_chosen_on_calibration_prompts(points: tuple[ResolvedPoint, ...]) -> None:
    lines = headlines(points, "clip")
    assert [(line.target, line.candidates, line.chosen_by) for line in lines] == [
        (0.5, 2, "calibration"),
        (0.7, 2, "calibration"),
    ]
    best = max(pick(points, "search", 0.5), key=lambda p: p.calibration_psnr or 0.0)
    assert lines[0].searched == best.key


def test_statements_count_verdicts_and_name_the_largest_gain(
    points: tuple[ResolvedPoint, ...],
) -> None:
    lines = headlines(points, "psnr")
    count, most = statements(lines, points)
    beats = sum(line.verdict == "beats" for line in lines)
    assert f"same compute at {beats} of 2 models and targets" in count
    best = max(lines, key=lambda line: line.gain.value if line.gain else 0.0)
    assert best.gain is not None and best.gains["psnr"] == best.gain
    assert f"at target {best.target:g}, the largest gain of 2 targets" in most
    for metric, gain in best.gains.items():
        assert f"{gain.text(metric)} ({gain.verdict} " in most


def test_statement_without_a_bar_says_that_it_is_not_known() -> None:
    assert statements((), ()) == ()


def test_headline_ignores_figures_of_the_test_set(points: tuple[ResolvedPoint, ...]) -> None:
    worst = min(pick(points, "search", 0.5), key=lambda p: p.value("clip") or 0.0)
    known = [
        replace(p, calibration_clip=40.0 if p.key == worst.key else 30.0)
        for p in pick(points, "search", 0.5)
    ]
    line = headlines(known, "clip")[0]
    assert (line.searched, line.chosen_by) == (worst.key, "calibration")


def test_export_carries_origin_and_figures(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    point = pick(points, "search", 0.5)[0]
    subnet = export_subnet(point, finished.store.records(), finished.sweep)
    assert tuple(subnet.gates.to_strings()) == point.keep
    assert subnet.provenance["sweep_digest"] == finished.sweep.digest
    assert subnet.provenance["search"]["loss"]["alpha"] in (0.5, 1.0)
    assert subnet.metrics["clip"] == point.value("clip")
    assert subnet.metrics["scorers"]["clip"] == "tiny"
    protocol = Protocol.from_json(subnet.provenance["protocol_fields"])
    assert protocol.hash == subnet.provenance["protocol"] == subnet.metrics["protocol"]
    assert subnet.metrics["n"]["clip"] == 64
    assert subnet.from_json(subnet.to_json()) == subnet


def test_export_of_an_unfinished_point_is_refused(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    with pytest.raises(StoreError, match="is not evaluated yet"):
        export_subnet(replace(points[0], evaluate_key=None), {}, finished.sweep)


def test_facts_have_enough_prompts() -> None:
    assert sweep_facts(a_sweep())["tiny"].test.count == 64


def features(seed: int, shift: float = 0.0, count: int = 96) -> Floats:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, 4))


def frechet(a: Floats, b: Floats) -> float:
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.real(np.trace(sqrtm(cov_a @ cov_b)))
    gap = a.mean(axis=0) - b.mean(axis=0)
    return float(gap @ gap + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def test_fid_difference_equals_recomputing_without_each_block() -> None:
    a, b, reference, prompts = features(1, 0.3), features(2), features(3), np.arange(96)
    sides = [fid_replicates(x, reference, prompts) for x in (a, b)]
    assert sides[0] is not None and sides[1] is not None
    blocks = (np.random.default_rng(0).permutation(96) % 32)[np.arange(96)]
    left = [
        frechet(a[blocks != k], reference) - frechet(b[blocks != k], reference) for k in range(32)
    ]
    whole = frechet(a, reference) - frechet(b, reference)
    found = interval_of(difference_of(sides[0], sides[1]))
    assert found.value == pytest.approx(32 * whole - 31 * np.mean(left), abs=1e-6)
    spread = np.sqrt(31 / 32 * ((left - np.mean(left)) ** 2).sum())
    assert found.high - found.value == pytest.approx(2.0395 * spread, rel=1e-3)


def test_kid_difference_equals_the_unbiased_estimators() -> None:
    a, b, reference, prompts = features(1, 0.3), features(2), features(3), np.arange(96)

    def kernel(x: Floats, y: Floats) -> Floats:
        result: Floats = (x @ y.T / 4 + 1) ** 3
        return result

    def kid(x: Floats) -> float:
        own = kernel(x, x)
        within = (own.sum() - np.trace(own)) / (96 * 95)
        return float(within - 2 * kernel(x, reference).mean())

    sides = [kid_replicates(x, reference, prompts) for x in (a, b)]
    assert sides[0] is not None and sides[1] is not None
    found = interval_of(difference_of(sides[0], sides[1]))
    assert found.value == pytest.approx(kid(a) - kid(b))
    assert found.low <= found.value <= found.high


def test_replicates_that_take_long_are_kept_in_the_store(
    finished: Finished, points: tuple[ResolvedPoint, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, key = finished.store.records(), pick(points, "search", 0.7)[0].evaluate_key or ""
    made = Comparisons(finished.store, records).replicates("kid", key)
    monkeypatch.setitem(DISTRIBUTIONS, "kid", lambda *_: pytest.fail("made again"))
    kept = Comparisons(finished.store, records).replicates("kid", key)
    assert made is not None and kept is not None
    assert np.array_equal(made.values, kept.values)
    assert (made.groups, made.n, made.method) == (kept.groups, kept.n, kept.method)


def test_damaged_replicates_are_made_again(
    finished: Finished, points: tuple[ResolvedPoint, ...], caplog: pytest.LogCaptureFixture
) -> None:
    records, key = finished.store.records(), pick(points, "search", 0.5)[0].evaluate_key or ""
    made = Comparisons(finished.store, records).replicates("kid", key)
    finished.store.put_derived(key, "replicates-kid-64-prompts.safetensors", b"torn")
    again = Comparisons(finished.store, records).replicates("kid", key)
    assert made is not None and again is not None and np.array_equal(made.values, again.values)
    assert "damaged" in caplog.text


def test_store_that_can_only_be_read_is_read(
    finished: Finished, points: tuple[ResolvedPoint, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, data: bytes, *, durable: bool = False) -> None:
        raise StoreError("the file system is mounted read-only")

    records, key = finished.store.records(), pick(points, "search", 0.5)[0].evaluate_key or ""
    monkeypatch.setattr(finished.store, "get_derived", lambda *_: None)
    monkeypatch.setattr(finished.store.backend, "put", refused)
    assert Comparisons(finished.store, records).replicates("kid", key) is not None


def test_export_refuses_what_gates_alone_do_not_make(
    finished: Finished, points: tuple[ResolvedPoint, ...]
) -> None:
    """A point without guidance at its last calls, of which a SubNet file says nothing."""
    point = pick(points, "search", 0.5)[0]
    records = dict(finished.store.records())
    record = records[str(point.evaluate_key)]
    subnet = record.outputs["subnet"]
    halved = {**subnet, "sampler": {**subnet["sampler"], "guidance_calls": 2}}
    records[record.key] = replace(record, outputs={**record.outputs, "subnet": halved})
    with pytest.raises(StoreError, match="leaves guidance out at its last calls"):
        export_subnet(point, records, finished.sweep)


@pytest.mark.parametrize("method", get_args(Method))
def test_every_method_has_a_mark_a_shape_and_a_colour(
    points: tuple[ResolvedPoint, ...], method: Method
) -> None:
    point = replace(points[0], method=method, strategy="dipgo")
    assert shape_of(point, ["dipgo"]) in SHAPES
    assert mark_of(point, ["dipgo"]).label
    css = files("orchestrator").joinpath("templates/report.css").read_text("utf-8")
    assert f".{method} {{ --kind" in css or f".{method}, " in css
