"""compare: what is put side by side, what is refused. Oracle: the arrays of the records."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from dipgo_core.errors import ConfigError
from orchestrator.cli import main
from orchestrator.cli.compare import (
    Compared,
    compare_sweeps,
    comparisons_json,
    print_comparisons,
)
from orchestrator.cli.sweeps import Results
from orchestrator.compare import (
    Comparison,
    Side,
    compare_all,
    compare_sides,
    matching_points,
    side_of_point,
    side_of_subnet,
)
from orchestrator.export import export_subnet
from orchestrator.points import ResolvedPoint
from orchestrator.store import open_store
from orchestrator.sweep_settings import Baseline, SweepFile
from tests.orchestrator.finished_sweep import finish
from tests.orchestrator.tiny_sweep import tiny_sweep

BASELINES = (Baseline(name="uniform"),)


def a_sweep(images: int = 64, models: tuple[str, ...] = ("tiny",)) -> SweepFile:
    sweep = tiny_sweep(
        targets=(0.5,), baselines=BASELINES, models=models,
        metrics=("fid", "kid", "clip", "psnr", "latency"),
    )  # fmt: skip
    sized = (replace(m, evaluate=replace(m.evaluate, images=images)) for m in sweep.models)
    return replace(sweep, models=tuple(sized))


def results_of(sweep: SweepFile, folder: Path) -> Results:
    done = finish(sweep, open_store(folder))
    return Results(done.sweep, done.store, done.plan)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of(a_sweep(models=("tiny", "other")), tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def fewer(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The same sweep with half the images."""
    return results_of(a_sweep(images=32), tmp_path_factory.mktemp("fewer"))


def pick(results: Results, method: str, model: str = "tiny") -> ResolvedPoint:
    return next(p for p in results.points if p.method == method and p.model == model)


def side(results: Results, method: str, model: str = "tiny") -> Side:
    point = pick(results, method, model)
    return side_of_point(point, results.store.records(), results.comparisons)


def exported(results: Results, method: str, path: Path) -> Path:
    export_subnet(pick(results, method), results.store.records(), results.sweep).save(path)
    return path


def row(found: Comparison, figure: str):  # type: ignore[no-untyped-def]
    return next(row for row in found.rows if row.figure == figure)


def per_image(results: Results, method: str, metric: str) -> np.ndarray:
    record = results.store.records()[pick(results, method).evaluate_key or ""]
    return load(results.store.get_artifact(record, "per_image.safetensors"))[metric]


@pytest.mark.parametrize("metric", ["clip", "psnr"])
def test_difference_of_two_points_is_paired(results: Results, metric: str) -> None:
    told = row(compare_sides(side(results, "uniform"), side(results, "search")), metric).difference
    images = per_image(results, "search", metric) - per_image(results, "uniform", metric)
    assert told.paired and told.value == pytest.approx(images.mean())
    reach = 1.96 * images.std(ddof=1) / np.sqrt(len(images))
    assert told.high - told.low == pytest.approx(2 * reach, rel=0.15)
    assert told.better == ("B" if told.low > 0 else "A" if told.high < 0 else None)


def test_turning_the_sides_turns_the_difference(results: Results) -> None:
    a, b = side(results, "uniform"), side(results, "search")
    there, back = (row(compare_sides(*pair), "psnr").difference for pair in ((a, b), (b, a)))
    assert there.value == -back.value and there.low == pytest.approx(-back.high)
    assert {there.better, back.better} == {"A", "B"}


def test_two_files_are_compared_unpaired(results: Results, tmp_path: Path) -> None:
    from dipgo_core.subnet import SubNet

    paths = [exported(results, m, tmp_path / f"{m}.json") for m in ("uniform", "search")]
    files = [side_of_subnet(SubNet.load(path), path.name) for path in paths]
    told = row(compare_sides(files[0], files[1]), "clip").difference
    with_arrays = compare_sides(side(results, "uniform"), side(results, "search"))
    paired = row(with_arrays, "clip").difference
    assert not told.paired and told.value == paired.value
    assert told.high - told.low > paired.high - paired.low


def test_speeds_are_compared_by_their_ratio(results: Results) -> None:
    a, b = side(results, "uniform"), side(results, "search")
    told = row(compare_sides(a, b), "speedup").difference
    assert told.kind == "ratio"
    assert told.value == pytest.approx(b.figures["speedup"].value / a.figures["speedup"].value)


def test_latency_of_another_device_is_left_out_with_the_reason(results: Results) -> None:
    a = side(results, "uniform")
    b = replace(side(results, "search"), conditions={**(a.conditions or {}), "device": "a GPU"})
    found = compare_sides(a, b)
    assert not {"speedup", "latency_ms"} & {row.figure for row in found.rows}
    assert any("device: 'a quiet cpu' against 'a GPU'" in note for note in found.notes)


def test_same_subnet_differs_by_exactly_nothing(results: Results) -> None:
    found = compare_sides(side(results, "uniform"), side(results, "uniform"))
    assert {r.difference.value for r in found.rows if r.difference.kind == "difference"} == {0.0}
    assert any("same SubNet" in note for note in found.notes)


def test_two_models_are_refused(results: Results) -> None:
    with pytest.raises(ConfigError, match="model: tiny .* against other"):
        compare_sides(side(results, "uniform"), side(results, "uniform", "other"))


def test_two_protocols_are_refused_with_every_field(results: Results, fewer: Results) -> None:
    with pytest.raises(ConfigError) as caught:
        compare_sweeps(results, fewer, None)
    text = str(caught.value)
    assert "images: 64 against 32" in text and "kid_subset_size: 32 against 16" in text
    assert "Measure both alike" in text


def test_cli_refuses_files_of_two_protocols_as_bad_usage(
    results: Results, fewer: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [exported(results, "search", tmp_path / "a.json"),
             exported(fewer, "search", tmp_path / "b.json")]  # fmt: skip
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, files)])
    assert caught.value.code == 2
    assert "images: 64 against 32" in capsys.readouterr().err


def test_cli_compares_files_as_json(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [exported(results, m, tmp_path / f"{m}.json") for m in ("uniform", "search")]
    with pytest.raises(SystemExit) as caught:
        main(["compare", *map(str, files), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert caught.value.code == 0
    assert set(document["protocols"]) == {one["protocol"] for one in document["comparisons"]}
    figures = {row["figure"] for row in document["comparisons"][0]["rows"]}
    assert {"clip", "psnr", "kid", "fid", "speedup", "macs_speedup"} <= figures


@pytest.mark.parametrize("arguments", [["a.json"], ["a.yaml", "b.json"], ["a", "b", "c"]])
def test_cli_says_what_compare_takes(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    assert caught.value.code == 2 and "compare takes" in capsys.readouterr().err


def test_file_that_says_nothing_of_its_protocol_is_refused(
    results: Results, tmp_path: Path
) -> None:
    subnet = export_subnet(pick(results, "search"), results.store.records(), results.sweep)
    with pytest.raises(ConfigError, match="export the SubNet again"):
        side_of_subnet(replace(subnet, provenance={}), "old.json")


def test_points_match_by_granularity_only_where_gates_are_searched(results: Results) -> None:
    """A whole call skipped is the same of blocks and of layers; a searched SubNet is not."""
    points = [point for point in results.points if point.model == "tiny"]
    layers = [replace(point, granularity="layer") for point in points]
    methods = {ours.method for ours, _ in matching_points(points, layers)}
    assert methods == {"dense", "uniform"}
    assert len(matching_points(points, points)) == len(points)


def test_sweeps_are_compared_by_matching_points_of_different_stores(
    results: Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = results_of(a_sweep(), tmp_path)
    found = compare_sweeps(results, other, "tiny")
    assert len(found.pairs) == sum(point.model == "tiny" for point in results.points)
    assert found.left_out == ()
    assert {one.a.key for one in found.pairs} == {
        p.key for p in results.points if p.model == "tiny"
    }
    document = comparisons_json(found)
    assert json.dumps(document, allow_nan=False) and len(document["protocols"]) == 1
    print_comparisons(found)
    assert "CLIP score (tiny), protocol" in capsys.readouterr().out


@pytest.mark.parametrize("stopped", ["dense", "search"])  # the first pair, and another one
def test_pairs_of_two_protocols_are_left_out_with_what_differs(
    results: Results, stopped: str
) -> None:
    pairs = [(side(results, method), side(results, method)) for method in ("dense", "search")]
    fewer = [
        (a, replace(b, protocol=replace(b.protocol, images=32, kid_subset_size=16)))
        if b.key == side(results, stopped).key
        else (a, b)
        for a, b in pairs
    ]
    found, left_out = compare_all(fewer)
    assert [one.a.key for one in found] == [a.key for a, b in fewer if a.protocol == b.protocol]
    (line,) = left_out
    assert line.startswith(f"{side(results, stopped).name} is not compared: ")
    assert "images: 64 against 32" in line and "kid_subset_size: 32 against 16" in line


def test_pairs_that_are_left_out_are_shown(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = compare_sides(side(results, "uniform"), side(results, "search"))
    found = Compared((pair,), ("x is not compared: images: 64 against 32",))
    print_comparisons(found)
    assert "x is not compared: images: 64 against 32" in capsys.readouterr().out
    assert comparisons_json(found)["left_out"] == list(found.left_out)


def test_macs_of_another_convention_are_left_out_with_the_reason(results: Results) -> None:
    a, b = side(results, "uniform"), side(results, "search")
    assert "macs_speedup" in {row.figure for row in compare_sides(a, b).rows}
    found = compare_sides(a, replace(b, convention="paper"))
    assert "macs_speedup" not in {row.figure for row in found.rows}
    assert "MACs are not compared: macs_convention: 'all' against 'paper'" in found.notes


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("kid", "abc", "kid must be a number, got 'abc'"),
        ("psnr", True, "psnr must be a number, got True"),
        ("kid_low", "x", "kid_low must be a number, got 'x'"),
        ("n", 5, "metrics.n must be an object, got 5"),
        ("n", {"kid": []}, "kid must be a number"),
        ("scorers", "clip", "metrics.scorers must be an object"),
        ("macs_speedup", 0, "macs_speedup must be above zero, got 0"),
        ("speedup_low", -1.0, "speedup_low must be above zero"),
    ],
)
def test_file_with_damaged_figures_is_refused(
    results: Results, field: str, value: object, rule: str
) -> None:
    subnet = export_subnet(pick(results, "search"), results.store.records(), results.sweep)
    damaged = replace(subnet, metrics={**subnet.metrics, field: value})
    with pytest.raises(ConfigError, match=f"x.json .*{rule}.*export the SubNet again"):
        side_of_subnet(damaged, "x.json")


@pytest.mark.parametrize(("field", "value"), [("latency", 3), ("protocol_fields", "x")])
def test_file_with_damaged_provenance_is_refused(
    results: Results, field: str, value: object
) -> None:
    subnet = export_subnet(pick(results, "search"), results.store.records(), results.sweep)
    damaged = replace(subnet, provenance={**subnet.provenance, field: value})
    with pytest.raises(ConfigError, match="export the SubNet again"):
        side_of_subnet(damaged, "x.json")


def test_sweeps_without_a_common_model_are_refused(results: Results, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no model"):
        compare_sweeps(results, results_of(a_sweep(models=("third",)), tmp_path), None)
