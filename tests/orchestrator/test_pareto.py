"""Fronts: brute force, areas counted by hand and Monte Carlo are the oracles."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib import figure

from dipgo_core.evaluation.intervals import Figure
from orchestrator.figures import draw_front, legend_handles
from orchestrator.gains import Gain
from orchestrator.pareto import (
    CROSSED,
    front_table,
    hypervolume,
    hypervolume_series,
    is_crossed,
    knee_note,
    knee_point,
    non_dominated,
    pareto_fronts,
    pareto_json,
)
from orchestrator.planned import Dropped
from orchestrator.points import ResolvedPoint
from orchestrator.search_cost import SearchCost
from orchestrator.standing import dominance

CONTRACT = {
    "key", "model", "method", "strategy", "loss", "sampler", "target", "pruned_ratio", "macs",
    "macs_speedup", "latency_ms", "speedup", "fid", "kid", "clip", "psnr", "ssim", "n_images",
    "seed", "state", "subnet", "gain",
}  # fmt: skip


def point(key: str, speedup: float | None, **changes: Any) -> ResolvedPoint:
    """Return a point; `clip`, `clip_low`, ... make its figures."""
    figures = {
        name: Figure(
            changes.pop(name),
            changes.pop(f"{name}_low", None),
            changes.pop(f"{name}_high", None),
            64,
        )
        for name in ("clip", "fid", "psnr")
        if name in changes
    }
    fields: dict[str, Any] = {
        "key": key, "model": "m", "model_id": "m", "method": "search", "strategy": "dipgo",
        "loss": None, "sampler": {}, "target": 0.5, "seed": 0, "variant": None, "protocol": "p",
        "state": "done", "name": key, "device": "cpu", "speedup": speedup, "n_images": 64,
        "figures": figures,
    }  # fmt: skip
    return ResolvedPoint(**(fields | changes))


def beating(key: str, speedup: float, clip: float) -> ResolvedPoint:
    gain = Gain(value=1.0, low=0.5, high=1.5, baseline_key="b", n=16)
    return point(key, speedup, clip=clip, gain={"clip": gain}, verdicts={"clip": "beats"})


def cloud(seed: int, count: int = 40) -> list[ResolvedPoint]:
    values = np.random.default_rng(seed).integers(1, 12, (count, 2)).astype(float)
    return [point(f"{i:02d}", x, fid=y) for i, (x, y) in enumerate(values)]


@pytest.mark.parametrize("seed", range(5))
def test_non_dominated_equals_brute_force(seed: int) -> None:
    points = cloud(seed)
    pairs = [(p.speedup or 0.0, -p.figures["fid"].value) for p in points]
    expected = [not any(b[0] >= a[0] and b[1] >= a[1] and b != a for b in pairs) for a in pairs]
    assert non_dominated(points, "speedup", "fid") == expected


def test_front_keeps_equal_points() -> None:
    front = pareto_fronts([point("a", 2.0, clip=5.0), point("b", 2.0, clip=5.0)])[0]
    assert front.points == ("a", "b")


def test_lower_fid_is_better_and_higher_clip_is_better() -> None:
    points = [point("a", 2.0, fid=1.0, clip=9.0), point("b", 2.0, fid=3.0, clip=8.0)]
    assert [front.points for front in pareto_fronts(points)] == [("a",), ("a",)]


@pytest.mark.parametrize("field", ["model", "protocol", "device"])
def test_fronts_never_mix(field: str) -> None:
    points = [point("a", 2.0, clip=5.0), point("b", 3.0, clip=6.0, **{field: "other"})]
    fronts = pareto_fronts(points)
    assert sorted(front.points for front in fronts) == [("a",), ("b",)]


def test_hypervolume_counts_the_area_by_hand() -> None:
    points = [point("a", 2.0, clip=3.0), point("b", 3.0, clip=1.0)]
    assert hypervolume(points, "speedup", "clip", (1.0, 0.0)) == pytest.approx(1 * 3 + 1 * 1)


def test_hypervolume_of_fid_equals_monte_carlo() -> None:
    points, reference = cloud(3), (1.0, 12.0)
    drawn = np.random.default_rng(0).uniform((1.0, 0.0), (12.0, 12.0), (200_000, 2))
    covered = np.zeros(len(drawn), dtype=bool)
    for p in points:
        covered |= (drawn[:, 0] <= (p.speedup or 0)) & (drawn[:, 1] >= p.figures["fid"].value)
    expected = covered.mean() * 11 * 12
    assert hypervolume(points, "speedup", "fid", reference) == pytest.approx(expected, rel=0.01)


def test_front_states_its_reference_point() -> None:
    front = pareto_fronts([point("a", 2.0, fid=1.0), point("b", 1.5, fid=7.0)])[0]
    assert front.reference_point == (1.0, 7.0)
    assert front.hypervolume == pytest.approx((2.0 - 1.0) * (7.0 - 1.0))


def test_knee_is_farthest_above_the_chord() -> None:
    front = [point("a", 1.0, clip=10.0), point("b", 2.0, clip=9.0), point("c", 3.0, clip=0.0)]
    knee = knee_point(front, "speedup", "clip", "any")
    assert knee is not None and knee.key == "b"


def test_knee_surely_beats_the_trivial_baseline() -> None:
    front = [point("a", 1.0, clip=10.0), point("b", 2.0, clip=9.0), beating("c", 3.0, 0.0)]
    knee = knee_point(front, "speedup", "clip")
    assert knee is not None and knee.key == "c"


def test_knee_of_nothing_is_none() -> None:
    assert knee_point([], "speedup", "clip") is None
    assert knee_point([], "speedup", "clip", "any") is None


def test_front_where_nothing_beats_recommends_its_best_baseline() -> None:
    points = [
        point("a", 1.0, clip=10.0, method="uniform"),
        point("b", 2.0, clip=9.0, method="uniform"),
        point("c", 2.5, clip=8.0),
        point("d", 3.0, clip=0.0, method="uniform"),
    ]
    front = pareto_fronts(points)[0]
    assert (front.knee, front.instead, front.knee_rule) == (None, "b", "beats_trivial")
    assert "shown to beat" in knee_note(points, front)
    assert "take the baseline b at 0.5" in knee_note(points, front)
    asked = pareto_fronts(points, knee="any")[0]
    assert (asked.knee, asked.instead, knee_note(points, asked)) == ("c", None, "")


def test_baseline_that_beats_the_one_to_beat_is_no_knee() -> None:
    lucky = replace(beating("a", 2.0, 9.0), method="uniform")
    front = pareto_fronts([lucky])[0]
    assert (front.knee, front.instead) == (None, "a")


def test_front_with_a_knee_recommends_nothing_else() -> None:
    points = [point("a", 1.0, clip=10.0, method="uniform"), beating("b", 3.0, 1.0)]
    front = pareto_fronts(points)[0]
    assert (front.knee, front.instead) == ("b", None)


@pytest.mark.parametrize(
    ("method", "verdict", "crossed"),
    [
        ("search", "beats", False), ("search", "ties", True), ("search", "unknown", True),
        ("random", "loses", False), ("uniform", "ties", False), ("dense", None, False),
    ],
)  # fmt: skip
def test_what_is_to_beat_baselines_and_does_not_is_crossed(
    method: str, verdict: str | None, crossed: bool
) -> None:
    verdicts = {} if verdict is None else {"clip": verdict}
    assert (
        is_crossed(point("a", 2.0, clip=1.0, method=method, verdicts=verdicts), "clip") is crossed
    )


def test_front_drawing_crosses_out_each_point_that_does_not_beat() -> None:
    points = [
        beating("a", 2.0, 5.0), point("b", 2.5, clip=4.0), point("c", 1.5, clip=1.0),
        point("d", 1.2, clip=6.0, method="uniform"),
    ]  # fmt: skip
    axes = figure.Figure().subplots()
    draw_front(axes, points, pareto_fronts(points)[0])
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    drawn = {(float(x), float(y)) for line in crosses for x, y in line.get_xydata()}
    assert drawn == {(2.5, 4.0), (1.5, 1.0)}
    assert CROSSED in [handle.get_label() for handle in legend_handles(points)]


def test_dense_is_not_compared_with_itself() -> None:
    dense = point("d", 1.0, method="dense", psnr=100.0, clip=9.0)
    fronts = {
        f.objectives[1]: f for f in pareto_fronts([dense, point("a", 2.0, psnr=30.0, clip=8.0)])
    }
    assert "d" not in fronts["psnr"].standing
    assert "d" in fronts["clip"].points


def test_unfinished_points_are_left_out() -> None:
    points = [point("a", 2.0, clip=1.0), point("b", 3.0, clip=2.0, state="pending")]
    assert pareto_fronts(points)[0].points == ("a",)


def test_disturbed_measurement_is_on_no_front_and_names_its_reason() -> None:
    noisy = {"latency_usable": False, "latency_note": "batch 1: a busy GPU"}
    points = [
        point("a", 2.0, macs_speedup=2.0, clip=1.0),
        point("b", None, macs_speedup=2.0, clip=2.0, **noisy),
    ]
    front = pareto_fronts(points)[0]
    assert front.points == ("a",)
    assert front.disturbed == {"b": "batch 1: a busy GPU"}
    assert not pareto_fronts(points, speed="macs_speedup")[0].disturbed


def test_fronts_without_latency_fall_back_to_counted_macs() -> None:
    points = [point("a", None, clip=1.0, macs_speedup=2.0, device=None)]
    front = pareto_fronts(points)[0]
    assert (front.objectives, front.device) == (("macs_speedup", "clip"), None)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(4.8, 5.2, "surely"), (2.5, 7.5, "possibly"), (0.5, 1.0, "no")]
)
def test_dominance_depends_on_the_intervals(low: float, high: float, expected: str) -> None:
    middle = (low + high) / 2
    a = point("a", 2.0, clip=middle, clip_low=low, clip_high=high)
    b = point("b", 2.0, clip=3.0, clip_low=2.0, clip_high=4.0)
    assert dominance(a, b, "speedup", "clip") == expected


def test_standing_follows_from_dominance() -> None:
    points = [
        point("best", 2.0, clip=5.0, clip_low=4.8, clip_high=5.2),
        point("near", 2.0, clip=4.9, clip_low=4.7, clip_high=5.1),
        point("far", 2.0, clip=1.0, clip_low=0.8, clip_high=1.2),
    ]
    standing = pareto_fronts(points)[0].standing
    assert standing == {"best": "possibly", "near": "possibly", "far": "no"}


def test_hypervolume_series_grows_to_the_front() -> None:
    points = [point("a", 2.0, clip=5.0), point("b", 3.0, clip=4.0), point("c", 1.5, clip=1.0)]
    front = pareto_fronts(points)[0]
    series = hypervolume_series(points, front, {"c": 0.1, "a": 0.2, "b": 0.4})
    assert [hours for hours, _ in series] == [0.1, 0.2, 0.4]
    assert series[-1][1] == pytest.approx(front.hypervolume)
    assert series == sorted(series, key=lambda row: row[1])


def lost(key: str, speedup: float, clip: float) -> ResolvedPoint:
    left = Dropped(images=16, by={"psnr": "a"})
    return point(key, speedup, clip=clip, psnr=1.0, state="dropped", dropped=left)


@pytest.mark.parametrize(("speedup", "expected"), [(2.5, "possibly"), (1.5, "surely")])
def test_front_that_was_not_raced_is_open_to_who_was_dropped(speedup: float, expected: str) -> None:
    found = pareto_fronts([point("a", 2.0, clip=30.0, psnr=30.0), lost("b", speedup, 33.0)])
    clip, psnr = (front for front in found if front.objectives[1] in ("clip", "psnr"))
    assert (clip.points, clip.standing) == (("a",), {"a": expected})
    assert clip.unraced == ("b",) and "1 point left a race that did not" in clip.racing_note
    assert psnr.standing == {"a": "surely"} and not psnr.racing_note


def test_pareto_json_keeps_the_contract() -> None:
    points = [beating("a", 2.0, 5.0)]
    document = json.loads(json.dumps(pareto_json(points, pareto_fronts(points))))
    assert set(document["points"][0]) >= CONTRACT
    assert document["points"][0]["gain"]["clip"] == {
        "value": 1.0, "low": 0.5, "high": 1.5, "baseline_key": "b", "n": 16,
    }  # fmt: skip
    assert set(document["fronts"][0]) >= {
        "model", "protocol", "device", "objectives", "points", "knee", "hypervolume",
        "reference_point",
    }  # fmt: skip
    for name in ("latency_ms", "speedup", "fid", "kid", "clip", "psnr", "ssim"):
        assert {f"{name}_low", f"{name}_high"} <= set(document["points"][0])


def test_front_table_shows_gain_and_knee() -> None:
    points = [beating("a", 2.0, 5.0), point("b", 3.0, clip=1.0, method="uniform")]
    rows = front_table(points, pareto_fronts(points)[0])
    assert [(row.key, row.gain, row.verdict, row.knee) for row in rows] == [
        ("a", "+1.0 [+0.5, +1.5]", "beats", True),
        ("b", "", "", False),
    ]


def test_front_table_shows_share_of_calls_and_search_cost() -> None:
    cost = SearchCost(forwards=20, sample_forwards=1500.0, seconds=12.4)
    points = [point("a", 2.0, clip=5.0, all_or_nothing_share=0.4, search_cost=cost)]
    row = front_table(points, pareto_fronts(points)[0])[0]
    assert (row.share, row.cost) == ("40 %", "1,500 forwards, 12 s")
