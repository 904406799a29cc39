"""Rungs: who of a model races at a rung, how fast each is, and which bars go on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.bars import best_of, calibration_figures, score_for
from orchestrator.methods import TRIVIAL
from orchestrator.planned import Point
from orchestrator.racing import Candidate
from orchestrator.records import Record
from orchestrator.speeds import speed_of

Records = Mapping[str, Record]


def candidates_of(
    runners: Sequence[Point],
    points: Sequence[Point],
    records: Records,
    *,
    by_latency: bool,
    metrics: Sequence[str],
) -> tuple[Candidate, ...]:
    """Return one candidate per evaluation; points with the same gates share theirs.

    runners: those of the model's `points` that are in the race, all of them scored.
    by_latency: whether speed is the measured one, as on the fronts; else MACs are counted.
    metrics: those of the sweep; each chooses a bar.
    """
    sharing: dict[str, list[Point]] = {}
    for point in runners:
        assert point.evaluate_key is not None
        sharing.setdefault(point.evaluate_key, []).append(point)
    bars = {p.key: _bars(p, points, records, metrics) for p in runners if p.method == "search"}
    return tuple(
        Candidate(
            key=key,
            **_speed(same[0], records, by_latency),
            bars=tuple(sorted({b for p in same for b in bars.get(p.key, ()) if b in sharing})),
            protected=any(point.method == "dense" for point in same),
        )
        for key, same in sharing.items()
    )


def _speed(point: Point, records: Records, by_latency: bool) -> dict[str, float | None]:
    """Return the figure that fronts use, larger = faster: the speed-up, or MACs, negated.

    None for a speed-up that was disturbed, or whose task has failed.
    """
    if not by_latency:
        return {"speed": -float(records[str(point.evaluate_key)].outputs["macs"]["kept"])}
    timed = records.get(str(point.latency_key))
    found = {} if timed is None else speed_of(timed)
    ends = {"speed": "speedup", "speed_low": "speedup_low", "speed_high": "speedup_high"}
    return {name: found.get(figure) for name, figure in ends.items()}


def _bars(
    point: Point, points: Sequence[Point], records: Records, metrics: Sequence[str]
) -> set[str]:
    """Return the evaluations of the baselines that this searched point has to beat."""
    rivals = [p for p in points if p.method in TRIVIAL and p.target == point.target]
    known = [
        calibration_figures(records.get(str(p.calibration_key)))
        if str(p.evaluate_key) in records else {}
        for p in rivals
    ]  # fmt: skip
    best = (best_of([score_for(m, each) for each in known]) for m in metrics)
    return {str(rivals[index].evaluate_key) for index in best if index is not None}
