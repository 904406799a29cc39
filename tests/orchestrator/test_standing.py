"""Who is surely on a front. Oracles: cases worked by hand, and simulated independent figures."""

from typing import Any

import numpy as np
import pytest

from dipgo_core.evaluation.intervals import Interval
from orchestrator.pareto import front_table, pareto_fronts
from orchestrator.points import ResolvedPoint
from orchestrator.standing import dominance, quality_gap
from tests.orchestrator.test_pareto import point


def ends(middle: float, reach: float) -> dict[str, float]:
    return {"clip": middle, "clip_low": middle - reach, "clip_high": middle + reach}


def evaluated(key: str, speedup: float, middle: float, reach: float, **more: Any) -> ResolvedPoint:
    return point(key, speedup, **{"evaluate_key": f"e{key}", **ends(middle, reach), **more})


def paired(reach: float) -> Any:
    """Differences as they are after pairing: of the middles of a and b, with a given reach."""
    middles = {"ea": 5.0, "eb": 4.9}

    def differences(metric: str, a: str, b: str) -> Interval:
        value = middles[a] - middles[b]
        return Interval(value, value - reach, value + reach)

    return differences


def test_pairing_decides_what_wide_intervals_leave_open() -> None:
    a, b = evaluated("a", 2.0, 5.0, 1.0), evaluated("b", 2.0, 4.9, 1.0)
    assert dominance(a, b, "speedup", "clip") == "possibly"
    assert dominance(a, b, "speedup", "clip", paired(0.05)) == "surely"
    assert dominance(b, a, "speedup", "clip", paired(0.05)) == "no"


def test_front_takes_paired_differences() -> None:
    points = [evaluated("a", 2.0, 5.0, 1.0), evaluated("b", 2.0, 4.9, 1.0)]
    assert pareto_fronts(points)[0].standing == {"a": "possibly", "b": "possibly"}
    assert pareto_fronts(points, differences=paired(0.05))[0].standing == {"a": "surely", "b": "no"}


def test_same_subnet_is_one_point_under_several_names() -> None:
    points = [
        evaluated("a", 2.0, 5.0, 1.0, method="uniform", name="uniform"),
        evaluated("b", 2.0, 5.0, 1.0, evaluate_key="ea", name="dipgo"),
        evaluated("c", 1.5, 1.0, 0.5, name="slow"),
    ]
    front = pareto_fronts(points)[0]
    assert front.standing == {"a": "surely", "b": "surely", "c": "no"}
    assert [row.names for row in front_table(points, front)] == [("uniform at 0.5", "dipgo at 0.5")]


def test_equal_latency_record_is_equal_speed() -> None:
    wide = {"speedup_low": 1.5, "speedup_high": 2.5, "latency_key": "l"}
    a, b = evaluated("a", 2.0, 5.0, 0.1, **wide), evaluated("b", 2.0, 1.0, 0.1, **wide)
    assert dominance(a, b, "speedup", "clip") == "surely"


@pytest.mark.parametrize(("reach", "expected"), [(0.05, "surely"), (0.5, "possibly")])
def test_speed_within_its_intervals_is_only_possibly_enough(reach: float, expected: str) -> None:
    a = evaluated("a", 2.2, 5.0, 0.1, speedup_low=2.2 - reach, speedup_high=2.2 + reach)
    b = evaluated("b", 2.0, 1.0, 0.1, speedup_low=2.0 - reach, speedup_high=2.0 + reach)
    assert dominance(a, b, "speedup", "clip") == expected


def test_counted_speed_is_exact() -> None:
    a = point("a", None, macs_speedup=2.0, clip=3.0, clip_low=2.9, clip_high=3.1)
    b = point("b", None, macs_speedup=2.0, clip=2.0, clip_low=1.9, clip_high=2.1)
    assert dominance(a, b, "macs_speedup", "clip") == "surely"
    assert dominance(b, a, "macs_speedup", "clip") == "no"


def test_quality_without_interval_leaves_all_possible() -> None:
    points = [point("a", 2.0, fid=1.0), point("b", 1.5, fid=90.0)]
    assert pareto_fronts(points)[0].standing == {"a": "surely", "b": "possibly"}


def test_lower_is_better_turns_the_difference() -> None:
    a = point("a", 2.0, fid=1.0, fid_low=0.8, fid_high=1.3)
    b = point("b", 2.0, fid=4.0, fid_low=3.6, fid_high=4.4)
    gap = quality_gap(a, b, "fid")
    assert gap.low == pytest.approx(3.0 - 0.5) and gap.high == pytest.approx(
        3.0 + np.hypot(0.2, 0.4)
    )
