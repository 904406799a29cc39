"""Headlines: for each model and target, the searched SubNet against its bars. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from orchestrator.gains import Gain, Verdict
from orchestrator.metrics import QUALITIES, label_of
from orchestrator.points import ResolvedPoint, calibration_score

Choice = Literal["only", "calibration"]


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The searched point shown for one model and target, and what it is worth.

    chosen_by: only = there was one; calibration = best on calibration prompts
    (`points.calibration_score`), never by a figure of the test set.
    gain, verdict: over the best trivial baseline. gain_random, verdict_random: over the mean of
    the random draws. None where there is nothing to compare with. gains, verdicts: over the best
    trivial baseline in every measured metric, each with the baseline that is best in it.
    scorer: id of the network behind the quality metric.
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
    gains: Mapping[str, Gain]
    verdicts: Mapping[str, Verdict]

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


def statements(lines: Iterable[Headline], points: Iterable[ResolvedPoint]) -> tuple[str, ...]:
    """Return the answer in sentences, of each metric: how often searched SubNets beat the best
    trivial baseline at the same compute, and of each model where they gain most."""
    by_key = {point.key: point for point in points}
    groups: dict[str, list[Headline]] = {}
    for line in lines:
        groups.setdefault(label_of(line.quality, line.scorer), []).append(line)
    told: list[str] = []
    for label, group in groups.items():
        told.append(_count(label, group))
        models: dict[tuple[str, str], list[Headline]] = {}
        for line in group:
            models.setdefault((line.model, line.protocol), []).append(line)
        told += [text for each in models.values() if (text := _most(each, by_key))]
    return tuple(told)


def _count(label: str, lines: Sequence[Headline]) -> str:
    found = Counter[str](line.verdict or "unknown" for line in lines)
    rest = {"ties with it": "ties", "loses to it": "loses", "not known": "unknown"}
    others = ", ".join(f"{words} at {found[v]}" for words, v in rest.items() if found[v])
    many = "model and target" if len(lines) == 1 else "models and targets"
    said = (
        f"In {label}, the searched SubNet beats the best trivial baseline at the same compute at "
        f"{found['beats']} of {len(lines)} {many}"
    )
    return f"{said}; {others}." if others else f"{said}."


def _most(lines: Sequence[Headline], by_key: Mapping[str, ResolvedPoint]) -> str:
    """Say of one model where the gain is largest, and what is gained there in every metric."""
    known = [line for line in lines if line.gain is not None]
    if not known:
        return ""
    best = max(known, key=lambda line: line.gain.value if line.gain else -math.inf)
    point = by_key[best.searched]
    which = f", the largest gain of {len(known)} targets" if len(known) > 1 else ""
    order = sorted(best.gains, key=lambda m: (m != best.quality, QUALITIES.index(m)))
    gains = "; ".join(_gained(m, best.gains[m], point, by_key) for m in order)
    return f"{best.model} at target {best.target:g}{which}: {point.name}: {gains}."


def _gained(
    metric: str, gain: Gain, point: ResolvedPoint, by_key: Mapping[str, ResolvedPoint]
) -> str:
    baseline = by_key[gain.baseline_key].name
    label = label_of(metric, point.scorer(metric))
    return f"{label} {gain.text(metric)} ({gain.verdict} {baseline})"


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
        gains=best.gain,
        verdicts=best.verdicts,
    )


def _choose(searched: Sequence[ResolvedPoint], quality: str) -> tuple[ResolvedPoint, Choice]:
    """Choose by the figure on calibration prompts, which every finished searched point has."""
    if len({point.subnet for point in searched}) == 1:
        return searched[0], "only"
    known = [(calibration_score(point, quality), point) for point in searched]
    best = max(known, key=lambda each: -math.inf if each[0] is None else each[0])
    return best[1], "calibration"
