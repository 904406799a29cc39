"""Fronts of speed against quality, knee and hypervolume. No torch.

The line of a front follows the figures as they are; what their intervals allow is in `standing`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import moocore
import numpy as np
import numpy.typing as npt

from dipgo_core.evaluation.metrics import PAIRED
from orchestrator.hypervolume import area_above
from orchestrator.methods import TRIVIAL
from orchestrator.metrics import QUALITIES, label_of, larger_is_better
from orchestrator.points import ResolvedPoint, State
from orchestrator.standing import Differences, Dominance, Speed, speed_gap, standings
from orchestrator.sweep_settings import KneeRule

#: What a speed objective takes from the sweep file's `objective.speed`.
SPEED_OF: Mapping[str, Speed] = {"latency": "speedup", "macs": "macs_speedup"}


#: What a cross over a point means, wherever fronts are drawn.
CROSSED = "crossed: searched, not shown to beat the best trivial baseline"


@dataclass(frozen=True, kw_only=True)
class Front:
    """The non-dominated points of one (model, protocol, device) for one pair of objectives.

    objectives: speed first, then the quality metric. points: keys, slowest first.
    knee: largest distance above the chord between the front's ends, both objectives scaled to
    [0, 1] over the front, among the points that `knee_rule` admits; None where it admits none, and
    then `instead` is the trivial baseline on the front that is highest above the chord, if any.
    reference_point: (1.0, worst quality of all points compared), unless one was given.
    standing: of every compared point, whether it is on the front given the intervals.
    scorer: id of the network behind the quality metric. disturbed: points that have no measured
    speed because their measurement was disturbed, and by what. unraced: points that a race dropped
    without looking at this quality; what they may still beat is at most possibly on the front.
    """

    model: str
    protocol: str
    device: str | None
    objectives: tuple[Speed, str]
    points: tuple[str, ...]
    knee: str | None
    hypervolume: float
    reference_point: tuple[float, float]
    standing: Mapping[str, Dominance]
    scorer: str | None = None
    disturbed: Mapping[str, str] = field(default_factory=dict)
    unraced: tuple[str, ...] = ()
    knee_rule: KneeRule = "beats_trivial"
    instead: str | None = None

    @property
    def racing_note(self) -> str:
        """Say what a race leaves open here; empty where it leaves nothing open."""
        if not self.unraced:
            return ""
        count = f"{len(self.unraced)} point" + ("s" if len(self.unraced) > 1 else "")
        label = label_of(self.objectives[1], self.scorer)
        return (
            f"{count} left a race that did not look at {label}; whoever is no faster than one of "
            "them is only possibly on this front."
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def pareto_fronts(
    points: Iterable[ResolvedPoint],
    *,
    speed: Speed = "speedup",
    qualities: Sequence[str] = QUALITIES,
    references: Mapping[str, tuple[float, float]] | None = None,
    differences: Differences | None = None,
    knee: KneeRule = "beats_trivial",
) -> tuple[Front, ...]:
    """Return one front per (model, protocol, device) and quality metric; protocols never mix.

    A group in which nothing but the dense run has the asked speed falls back to MACs speed-up.
    references: quality metric -> reference point of the hypervolume, to compare across sweeps.
    differences: paired differences; without them only the intervals of both sides count.
    knee: which points may be a front's knee.
    """
    fronts = []
    points = tuple(points)
    lost = _groups(points, speed, "dropped")
    for (model, protocol, device), group in _groups(points, speed, "done").items():
        axis: Speed = speed if _has_speed(group, speed) else "macs_speedup"
        for quality in qualities:
            compared = [p for p in group if _is_compared(p, axis, quality)]
            if not compared:
                continue
            reference = (references or {}).get(quality)
            where = (model, protocol, device if axis == "speedup" else None)
            front = _front(compared, where, (axis, quality), reference, differences, knee)
            unraced = [
                p for p in lost.get((model, protocol, device), ())
                if p.dropped and quality not in p.dropped.by
            ]  # fmt: skip
            front = _with_unraced(front, compared, unraced)
            fronts.append(replace(front, disturbed=_disturbed(group, speed)))
    return tuple(fronts)


def non_dominated(points: Sequence[ResolvedPoint], speed: Speed, quality: str) -> list[bool]:
    """Say of each point whether no other is at least as good in both and better in one."""
    values = _matrix(points, speed, quality)
    flags = moocore.is_nondominated(values, maximise=True, keep_weakly=True)
    return [bool(flag) for flag in flags]


def knee_point(
    front: Sequence[ResolvedPoint], speed: Speed, quality: str, rule: KneeRule = "beats_trivial"
) -> ResolvedPoint | None:
    """Return the point of `front` farthest above the chord between its ends, None if none may be.

    rule: `beats_trivial` admits only searched points that surely beat the best trivial baseline in
    `quality`, `any` all of them.
    """
    admitted = [rule == "any" or p.beats_trivial(quality) for p in front]
    return highest(admitted, front, speed, quality)


def highest(
    admitted: Sequence[bool], front: Sequence[ResolvedPoint], speed: Speed, quality: str
) -> ResolvedPoint | None:
    """Return the admitted point of `front` farthest above the chord between the front's ends.

    Both objectives are scaled to [0, 1] over the front, larger = better, so the distance is
    proportional to their sum minus 1. Ties go to the faster point, then to the smaller key.
    """
    if not any(admitted):
        return None
    values = _matrix(front, speed, quality)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    height = scaled.sum(axis=1).round(12)
    candidates = [i for i, may in enumerate(admitted) if may]
    best = max(candidates, key=lambda i: (height[i], values[i, 0], _reversed(front[i].key)))
    return front[best]


def knee_note(points: Iterable[ResolvedPoint], front: Front) -> str:
    """Say why a front has no knee, and which baseline to take instead; empty where it has one."""
    if front.knee is not None:
        return ""
    label = label_of(front.objectives[1], front.scorer)
    why = f"no knee: no point on this front is shown to beat the best trivial baseline in {label}"
    names = (name_at_target(point) for point in points if point.key == front.instead)
    instead = next((f"take the baseline {name}" for name in names), "no baseline is on it either")
    return f"{why}; {instead} (objective.knee: any takes a point all the same)"


def hypervolume(
    points: Sequence[ResolvedPoint], speed: Speed, quality: str, reference: tuple[float, float]
) -> float:
    """Return the area between the points and `reference` (speed, quality), in their units."""
    worst = (reference[0], larger_is_better(quality, reference[1]))
    return area_above(_matrix(points, speed, quality), worst)


def reference_point(
    points: Sequence[ResolvedPoint], speed: Speed, quality: str
) -> tuple[float, float]:
    """Return (1.0 = the dense run's speed, the worst quality among `points`)."""
    worst = _matrix(points, speed, quality)[:, 1].min()
    return 1.0, float(larger_is_better(quality, worst))


def hypervolume_series(
    points: Sequence[ResolvedPoint], front: Front, hours: Mapping[str, float]
) -> list[tuple[float, float]]:
    """Return (hours spent, hypervolume so far) each time a point of the front's group was done.

    hours: point key -> task-hours spent by the sweep when the point was complete.
    """
    compared = [p for p in points if p.key in front.standing and p.key in hours]
    compared.sort(key=lambda p: (hours[p.key], p.key))
    return [
        (hours[p.key], hypervolume(compared[: i + 1], *front.objectives, front.reference_point))
        for i, p in enumerate(compared)
    ]


def pareto_json(
    points: Iterable[ResolvedPoint],
    fronts: Iterable[Front],
    headlines: Iterable[Mapping[str, Any]] = (),
    statements: Iterable[str] = (),
) -> dict[str, Any]:
    """Return the document of `dipgo-sweep pareto --json`."""
    return {
        "statements": list(statements),
        "headlines": list(headlines),
        "points": [point.to_json() for point in points],
        "fronts": [front.to_json() for front in fronts],
    }


@dataclass(frozen=True, kw_only=True)
class FrontRow:
    """One SubNet on or possibly on a front, as tables show it; figures already formatted.

    names: of every point that is this SubNet. on_line: whether the front's line goes through it.
    share: of calls that compute all or nothing. cost: of its search.
    """

    key: str
    names: tuple[str, ...]
    speedup: str
    quality: str
    standing: Dominance
    on_line: bool
    gain: str
    verdict: str
    knee: bool
    share: str
    cost: str


def front_table(points: Iterable[ResolvedPoint], front: Front) -> tuple[FrontRow, ...]:
    """Return the rows of one front, slowest first: all of its line, and all that may be on it."""
    groups: dict[str, list[ResolvedPoint]] = {}
    for point in points:
        if point.key in front.points or front.standing.get(point.key) in ("surely", "possibly"):
            groups.setdefault(point.identity, []).append(point)
    rows = [_front_row(group, front) for group in groups.values()]
    by_key = {point.key: point for group in groups.values() for point in group}
    return tuple(sorted(rows, key=lambda r: (by_key[r.key].value(front.objectives[0]), r.key)))


def _front_row(group: Sequence[ResolvedPoint], front: Front) -> FrontRow:
    """Return the row of one SubNet; what is said of it is said of its searched point, if any."""
    point = next((p for p in group if p.is_searched), group[0])
    speed, quality = front.objectives
    gain = point.gain.get(quality)
    return FrontRow(
        key=point.key,
        names=tuple(name_at_target(p) for p in group),
        speedup=point.figure_text(speed),
        quality=point.figure_text(quality),
        standing=front.standing[point.key],
        on_line=point.key in front.points,
        gain="" if gain is None else gain.text(quality),
        verdict=point.verdicts.get(quality, "") if point.is_searched else "",
        knee=any(p.key == front.knee for p in group),
        share=share_text(point),
        cost="" if point.search_cost is None else point.search_cost.text,
    )


def is_crossed(point: ResolvedPoint, quality: str) -> bool:
    """Whether a drawing crosses a searched point out: it is not shown to beat its baseline."""
    return point.is_searched and not point.beats_trivial(quality)


def share_text(point: ResolvedPoint) -> str:
    """Return the share of calls that compute all blocks or none, such as ``40 %``."""
    share = point.all_or_nothing_share
    return "" if share is None else f"{100 * share:.0f} %"


def name_at_target(point: ResolvedPoint) -> str:
    """Name a point with its target, without its model."""
    return point.name if point.target is None else f"{point.name} at {point.target:g}"


# ---------------------------------------------------------------------------------------------

Group = tuple[str, str, str | None]


def _groups(
    points: Iterable[ResolvedPoint], speed: Speed, state: State
) -> dict[Group, list[ResolvedPoint]]:
    """Group the points of a state by model, protocol and, for measured speed, device."""
    groups: dict[Group, list[ResolvedPoint]] = {}
    for point in (point for point in points if point.state == state):
        device = point.device if speed == "speedup" else None
        groups.setdefault((point.model, point.protocol, device), []).append(point)
    return groups


def _with_unraced(
    front: Front, compared: Sequence[ResolvedPoint], unraced: Sequence[ResolvedPoint]
) -> Front:
    """Leave open who is on a front of a quality that a race did not look at.

    Of a dropped point's quality at the top rung nothing is known, so it may beat whatever is not
    surely faster.
    """
    speed = front.objectives[0]
    rivals = [rival for rival in unraced if rival.value(speed) is not None]
    open_keys = {
        point.key for point in compared for r in rivals if speed_gap(r, point, speed).high >= 0
    }
    standing = {
        key: "possibly" if found == "surely" and key in open_keys else found
        for key, found in front.standing.items()
    }
    return replace(front, standing=standing, unraced=tuple(rival.key for rival in rivals))


def _has_speed(group: Sequence[ResolvedPoint], speed: Speed) -> bool:
    return any(p.method != "dense" and p.value(speed) is not None for p in group)


def _disturbed(group: Sequence[ResolvedPoint], speed: Speed) -> dict[str, str]:
    if speed != "speedup":
        return {}
    return {p.key: p.latency_note or "" for p in group if p.latency_usable is False}


def _is_compared(point: ResolvedPoint, speed: Speed, quality: str) -> bool:
    """Whether both figures are known; the dense run has no distance to itself."""
    itself = point.method == "dense" and quality in PAIRED
    return not itself and _objectives(point, speed, quality) is not None


def _front(
    compared: Sequence[ResolvedPoint],
    where: Group,
    objectives: tuple[Speed, str],
    reference: tuple[float, float] | None,
    differences: Differences | None,
    rule: KneeRule,
) -> Front:
    reference = reference or reference_point(compared, *objectives)
    flags = non_dominated(compared, *objectives)
    best = [point for point, flag in zip(compared, flags, strict=True) if flag]
    best.sort(key=lambda p: (p.value(objectives[0]), p.key))
    knee = knee_point(best, *objectives, rule)
    baseline = highest([p.method in TRIVIAL for p in best], best, *objectives)
    return Front(
        model=where[0],
        protocol=where[1],
        device=where[2],
        objectives=objectives,
        points=tuple(point.key for point in best),
        knee=knee.key if knee else None,
        hypervolume=hypervolume(best, *objectives, reference),
        reference_point=reference,
        standing=standings(compared, *objectives, differences),
        scorer=compared[0].scorer(objectives[1]),
        knee_rule=rule,
        instead=baseline.key if baseline and not knee else None,
    )


def _objectives(point: ResolvedPoint, speed: Speed, quality: str) -> tuple[float, float] | None:
    x, y = point.value(speed), point.value(quality)
    return None if x is None or y is None else (float(x), larger_is_better(quality, float(y)))


def _matrix(points: Sequence[ResolvedPoint], speed: Speed, quality: str) -> npt.NDArray[np.float64]:
    """Stack (speed, quality), both larger = better."""
    return np.array([_objectives(point, speed, quality) for point in points], dtype=np.float64)


def _reversed(key: str) -> tuple[int, ...]:
    return tuple(-ord(letter) for letter in key)
