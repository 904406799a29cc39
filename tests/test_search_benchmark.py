"""The tables of the search benchmark: gains over seeds, bounds, cells that were not run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from orchestrator.sweep_file import load_sweep

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("search")
    sys.modules.pop("search", None)


def gain(value: float, low: float | None, high: float | None, key: str = "m") -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "baseline_key": key}


def a_point(method: str, key: str, **more: Any) -> dict[str, Any]:
    cost = {"sample_forwards": 200.0, "seconds": 30.0, "begun_with": {}, "peak_memory_bytes": None}
    return {
        "key": key, "model": "tiny-sd-ddim-10", "target": 0.5, "method": method, "name": key,
        "variant": key,
        "strategy": None, "seed": 0, "figures": {"psnr": {"value": 30.0}}, "gain": {},
        "gain_over": {}, "search_cost": cost, "all_or_nothing_share": 0.4, "extrapolation": 0.5,
        **more,
    }  # fmt: skip


def searched(seed: int, **gains: Any) -> dict[str, Any]:
    over = {"m": gains, "u": {"psnr": gain(9.0, 8.0, 10.0)}, "v": {"psnr": gain(4.0, 3.0, 5.0)}}
    return a_point("search", f"auto {seed}", strategy="auto", seed=seed, gain=gains, gain_over=over)


def points(*found: dict[str, Any]) -> list[dict[str, Any]]:
    dense = a_point("dense", "d", target=None, figures={"kid": {"value": 2.0}})
    others = [a_point("best_step_mask", "m"), a_point("uniform", "u"), a_point("uniform", "v")]
    return [dense, *others, *found]


def test_gain_is_the_mean_over_seeds_within_their_envelope(benchmark: ModuleType) -> None:
    first = searched(0, psnr=gain(1.0, 0.5, 1.5), kid=gain(0.3, 0.1, 0.5))
    second = searched(1, psnr=gain(2.0, 1.8, 2.2), kid=gain(0.1, -0.1, 0.3))
    (cell,) = benchmark.cells_of(points(first, second))
    found = cell.gained("psnr")
    assert (found.value, found.low, found.high, found.seeds) == (1.5, 0.5, 2.2, 2)
    assert found.beats and not cell.gained("kid").beats
    assert cell.gained("clip") is None


def test_hardest_setting_of_a_baseline_counts(benchmark: ModuleType) -> None:
    (cell,) = benchmark.cells_of(points(searched(0, psnr=gain(1.0, 0.5, 1.5))))
    assert cell.over("uniform", "psnr").value == 4.0
    assert cell.over("deepcache", "psnr") is None


@pytest.mark.parametrize(
    ("metric", "low", "worse"),
    [("psnr", -0.19, False), ("psnr", -0.21, True), ("kid", -0.09, False), ("kid", -0.11, True)],
)
def test_losses_are_bounded(
    benchmark: ModuleType, metric: str, low: float, worse: bool
) -> None:  # kid: 5 % of 2.0
    cells = benchmark.cells_of(points(searched(0, **{metric: gain(0.0, low, 0.3)})))
    assert bool(benchmark.worse_cells(cells)) is worse


def test_cells_that_were_not_run_are_named(benchmark: ModuleType) -> None:
    waiting = {**searched(0), "target": 0.7, "figures": {}}
    done = searched(0, psnr=gain(1.0, 0.5, 1.5), kid=gain(0.3, 0.1, 0.5))
    cells = benchmark.cells_of(points(done, waiting))
    text = benchmark.document(cells, {"CPU": "some"})
    assert "Cells run: 1 of 2. Not run: tiny-sd-ddim-10 at 0.7." in text
    assert "in 1 of 1 cells, and in KID or CLIP as well in 1" in text
    assert "auto" in text and "seed 0 (40%)" in text  # fewer than half of its calls all-or-nothing
    assert "| tiny-sd-ddim-10 | 0.7 | 0 of 1 |" in text
    assert "Nothing has been run yet" in benchmark.document(cells[1:], {})


def test_rivals_stand_in_the_cell_of_the_model_they_search(benchmark: ModuleType) -> None:
    rival = a_point(
        "search",
        "r",
        model="tiny-sd-rivals-ddim-10",
        strategy="anneal",
        gain={"psnr": gain(0.4, 0.1, 0.7)},
    )
    own = searched(0, psnr=gain(1.0, 0.5, 1.5))
    again = a_point("uniform", "u2", model="tiny-sd-rivals-ddim-10", variant="u")
    (cell,) = benchmark.cells_of(points(own, rival, again))
    assert set(cell.searched) == {"auto", "anneal"}
    assert [b["key"] for b in cell.baselines] == ["m", "u", "v"]
    assert cell.gained("psnr", "anneal").value == 0.4


def test_what_an_earlier_run_has_left_is_not_run_again(
    benchmark: ModuleType, tmp_path: Path
) -> None:
    left = tmp_path / "points.json"
    done = {"key": "auto 0", "figures": {"psnr": {"value": 31.0}}, "gain": {}}
    left.write_text(json.dumps([done]), encoding="utf-8")
    found = benchmark.with_earlier(
        [{**searched(0), "figures": {}}, {**searched(1), "figures": {}}], left
    )
    assert [bool(point["figures"]) for point in found] == [True, False]
    assert found[0]["name"] == "auto 0"
    assert benchmark.with_earlier([searched(0)], tmp_path / "missing.json") == [searched(0)]


def test_only_samplers_with_points_to_do_are_run(benchmark: ModuleType, tmp_path: Path) -> None:
    waiting = [
        {**searched(0), "model": name, "figures": {}}
        for name in ("tiny-dit-ddim-20", "tiny-sd-long")
    ]
    paths = list(benchmark.open_sweeps([searched(0), *waiting], tmp_path))
    assert [path.stem for path in paths] == ["tiny-dit-ddim-20", "tiny-sd-long"]
    for path in paths:
        (model,) = load_sweep(path).models
        assert model.name == path.stem
