"""Headlines: for each model and target, the searched SubNet against its bars. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.gains import Gain, Verdict
from orchestrator.points import ResolvedPoint, calibration_score

Choice = Literal["only", "calibration"]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The searched point shown for one model and target, and what it is worth.

    chosen_by: only = there was one; calibration = best on calibration prompts
    (`points.calibration_score`), never by a figure of the test set.
    gain, verdict: over the best trivial baseline. gain_random, verdict_random: over the mean of
    the random draws. None where there is nothing to compare with. scorer: id of the network behind
    the quality metric.
    """

    model: str
    protocol: str
    target: float
    quality: str
    scorer: str | None
    searched: str
    candidates: int
    chosen_by: Choice
    baseline: str | None
    gain: Gain | None
    verdict: Verdict | None
    gain_random: Gain | None
    verdict_random: Verdict | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def headlines(points: Iterable[ResolvedPoint], quality: str) -> tuple[Headline, ...]:
    """Return one headline per model, protocol and target with a finished searched point.

    Points that a race dropped count as finished, with the figures they have: whoever is left was
    chosen by the test set. (They have no FID.) A target that an exploration came upon has none:
    nobody else spends just as much.
    """
    points = tuple(points)
    shared = {(p.model, p.protocol, p.target) for p in points if not p.is_explored}
    groups: dict[tuple[str, str, float], list[ResolvedPoint]] = {}
    for point in points:
        finished = point.state in ("done", "dropped")
        if not point.is_searched or not finished or point.value(quality) is None:
            continue
        assert point.target is not None
        groups.setdefault((point.model, point.protocol, point.target), []).append(point)
    return tuple(
        _headline(*where, group, quality) for where, group in groups.items() if where in shared
    )


def _headline(
    model: str, protocol: str, target: float, searched: Sequence[ResolvedPoint], quality: str
) -> Headline:
    best, chosen_by = _choose(searched, quality)
    gain, gain_random = best.gain.get(quality), best.gain_random.get(quality)
    return Headline(
        model=model,
        protocol=protocol,
        target=target,
        quality=quality,
        scorer=best.scorer(quality),
        searched=best.key,
        candidates=len(searched),
        chosen_by=chosen_by,
        baseline=gain.baseline_key if gain else None,
        gain=gain,
        verdict=gain.verdict if gain else None,
        gain_random=gain_random,
        verdict_random=gain_random.verdict if gain_random else None,
    )


def _choose(searched: Sequence[ResolvedPoint], quality: str) -> tuple[ResolvedPoint, Choice]:
    """Choose by the figure on calibration prompts, which every finished searched point has."""
    if len({point.subnet for point in searched}) == 1:
        return searched[0], "only"
    known = [(calibration_score(point, quality), point) for point in searched]
    best = max(known, key=lambda each: -math.inf if each[0] is None else each[0])
    return best[1], "calibration"
