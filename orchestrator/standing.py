"""Standing: which points are surely, possibly or not on a front, given the intervals. No torch.

A point is *surely* on a front if no other point possibly dominates it, *not* on it if some other
surely does, else *possibly*. Whether a dominates b is read from the 95 % intervals of their
differences: in quality paired, image by image (`Comparisons.difference`), else from both intervals;
in speed from both speed-ups, each already paired with the dense run. Each pair is taken by itself,
without correction for their number. A quality without an interval (FID of few images) leaves
everything possible. Points that are one SubNet, evaluated once, are one point under several names:
they do not dominate each other, and all have its standing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

from dipgo_core.evaluation.intervals import Interval, unpaired_gap, unpaired_ratio
from orchestrator.metrics import larger_is_better
from orchestrator.points import ResolvedPoint

Speed = Literal["speedup", "macs_speedup"]
Dominance = Literal["surely", "possibly", "no"]
#: (metric, key of an evaluation, key of another) -> the first's figure minus the other's.
Differences = Callable[[str, str, str], Interval | None]


def standings(
    compared: Sequence[ResolvedPoint],
    speed: Speed,
    quality: str,
    differences: Differences | None,
) -> dict[str, Dominance]:
    """Say of each point whether it is surely, possibly or not on the front, given the intervals."""
    distinct = list({point.identity: point for point in compared}.values())
    found = {
        point.identity: _standing(point, distinct, speed, quality, differences)
        for point in distinct
    }
    return {point.key: found[point.identity] for point in compared}


def dominance(
    a: ResolvedPoint,
    b: ResolvedPoint,
    speed: Speed,
    quality: str,
    differences: Differences | None = None,
) -> Dominance:
    """Say whether `a` dominates `b`: as good in both and better in one; surely, possibly, or no."""
    if a.identity == b.identity:
        return "no"
    faster = speed_gap(a, b, speed)
    if faster.high < 0:
        return "no"
    better = quality_gap(a, b, quality, differences)
    if faster.low >= 0 and better.low >= 0 and max(faster.low, better.low) > 0:
        return "surely"
    return "possibly" if better.high >= 0 and max(faster.high, better.high) > 0 else "no"


def speed_gap(a: ResolvedPoint, b: ResolvedPoint, speed: Speed) -> Interval:
    """Return by what a is faster than b, as the logarithm of the ratio; exact where counted."""
    if a.latency_key is not None and a.latency_key == b.latency_key:
        return Interval(0.0, 0.0, 0.0)
    return unpaired_ratio(_speed(a, speed), _speed(b, speed))


def quality_gap(
    a: ResolvedPoint, b: ResolvedPoint, quality: str, differences: Differences | None = None
) -> Interval:
    """Return by what a is better than b: paired if it can be; unbounded where nothing is known."""
    found = None
    if differences is not None and a.evaluate_key and b.evaluate_key:
        found = differences(quality, a.evaluate_key, b.evaluate_key)
    if found is not None:
        return _turned(found, quality)
    mine, theirs = a.figures[quality], b.figures[quality]
    value = larger_is_better(quality, mine.value - theirs.value)
    if None in (mine.low, mine.high, theirs.low, theirs.high):
        return Interval(value, -math.inf, math.inf)
    return unpaired_gap(*(_turned(_interval(one, quality), quality) for one in (a, b)))


def _standing(
    point: ResolvedPoint,
    others: Sequence[ResolvedPoint],
    speed: Speed,
    quality: str,
    differences: Differences | None,
) -> Dominance:
    possible = False
    for other in others:
        found = dominance(other, point, speed, quality, differences)
        if found == "surely":
            return "no"
        possible = possible or found == "possibly"
    return "possibly" if possible else "surely"


def _speed(point: ResolvedPoint, speed: Speed) -> Interval:
    value = point.value(speed)
    assert value is not None
    return Interval(value, *point.interval(speed))


def _interval(point: ResolvedPoint, quality: str) -> Interval:
    return Interval(point.figures[quality].value, *point.interval(quality))


def _turned(found: Interval, quality: str) -> Interval:
    """Return the interval with larger = better."""
    ends = sorted(larger_is_better(quality, end) for end in (found.low, found.high))
    return Interval(larger_is_better(quality, found.value), ends[0], ends[1])
