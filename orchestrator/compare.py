"""compare: two ways to run one model, figure by figure, under one protocol or not at all. No torch.

Differences are B - A of a quality, B / A of a speed. Paired wherever both sides' arrays are there:
each resample draws the same prompts on both sides. From two files alone they are unpaired: such an
interval is wider than it need be, for both sides share prompts and noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from dipgo_core.errors import ConfigError, EvaluationError
from dipgo_core.evaluation.intervals import (
    Figure,
    Interval,
    Replicates,
    difference_of,
    interval_of,
    unpaired_gap,
    unpaired_ratio,
)
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.subnet import SubNet
from orchestrator.gains import Comparisons, containing
from orchestrator.metrics import FIGURES, IMAGE_FIGURES, QUALITIES, label_of
from orchestrator.points import ResolvedPoint
from orchestrator.protocol_text import short
from orchestrator.records import Record, canonical, content_key
from orchestrator.speeds import TIMES, latency_conditions

COUNTED = ("macs_speedup",)
ALIKE = (
    "Measure both alike: give both sweep files the same values and run them again (what is done is "
    "not computed anew)."
)
Replicated = Callable[[str], Replicates | None]


def _no_arrays(metric: str) -> Replicates | None:
    return None


@dataclass(frozen=True, kw_only=True, eq=False)
class Side:
    """One point, as it is compared.

    model, weights: id, and digest of the weights. figures: by name, speeds included. convention:
    how its MACs are counted. conditions: what its latency was measured under, None where it was
    not. evaluation: key of the task that
    made its images. replicates: of a metric of its images, None where the arrays are not at hand.
    """

    name: str
    key: str
    model: str
    weights: str
    protocol: Protocol
    figures: Mapping[str, Figure]
    convention: str
    conditions: Mapping[str, Any] | None = None
    evaluation: str
    replicates: Replicated = _no_arrays


@dataclass(frozen=True, kw_only=True)
class Difference:
    """By how much B differs from A; positive = more. Bounds are None where none are known.

    kind: "difference", B - A, or "ratio", B / A. better: whose figure is surely better; None: the
    interval excludes neither, or there is none.
    """

    kind: Literal["difference", "ratio"]
    value: float
    low: float | None
    high: float | None
    paired: bool
    better: Literal["A", "B"] | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure of both sides."""

    figure: str
    scorer: str | None
    a: Figure
    b: Figure
    difference: Difference

    @property
    def label(self) -> str:
        return label_of(self.figure, self.scorer)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two points under one protocol. notes: what was left out, and why."""

    a: Side
    b: Side
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        sides = {
            side: {"name": one.name, "key": one.key, "latency": one.conditions}
            for side, one in (("a", self.a), ("b", self.b))
        }
        return {**sides, "rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}


def side_of_point(
    point: ResolvedPoint, records: Mapping[str, Record], comparisons: Comparisons
) -> Side:
    """Return a point of a sweep as it is compared.

    Raises:
        ConfigError: it is not evaluated yet.
    """
    record = records.get(point.evaluate_key or "")
    if record is None:
        raise ConfigError(
            f"point {point.key[:12]} ({point.name}) is not evaluated yet ({point.state}): "
            "run the sweep, then compare again"
        )
    timed = records.get(point.latency_key or "")
    figures = {**point.figures, **_speeds(point)}
    target = "" if point.target is None else f" at {point.target:g}"
    return Side(
        name=f"{point.model}: {point.name}{target}",
        key=point.key,
        model=point.model_id,
        weights=record.inputs["model"]["weights_sha256"],
        protocol=Protocol.from_json(record.inputs["protocol"]),
        figures=figures,
        convention=record.inputs["macs_convention"],
        conditions=None if timed is None else latency_conditions(timed),
        evaluation=record.key,
        replicates=lambda metric: comparisons.replicates(metric, record.key),
    )


def side_of_subnet(subnet: SubNet, name: str) -> Side:
    """Return a SubNet file as it is compared.

    Raises:
        ConfigError: the file does not say how it was measured.
    """
    origin = subnet.provenance
    try:
        protocol = Protocol.from_json(origin["protocol_fields"])
        return Side(
            name=name,
            key=str(origin["point"]),
            model=str(subnet.model["id"]),
            weights=str(origin["weights_sha256"]),
            protocol=protocol,
            figures=_figures_of_file(_mapping(subnet.metrics, "metrics"), protocol),
            convention=str(subnet.macs["convention"]),
            conditions=_mapping_or_none(origin.get("latency"), "latency"),
            evaluation=str(origin["evaluate_key"]),
        )
    except (KeyError, TypeError, ValueError, EvaluationError) as error:
        raise ConfigError(
            f"{name} does not say how it was measured ({error}): export the SubNet again with "
            "`dipgo-sweep export`"
        ) from error


def check_comparable(a: Side, b: Side) -> None:
    """Check that both are one model under one protocol.

    Raises:
        ConfigError: names every field that differs, and what to do.
    """
    differences = _differences(a, b)
    if differences:
        raise _incomparable(a, b, differences)


def _differences(a: Side, b: Side) -> list[str]:
    """Return a line for everything that keeps two sides from being compared."""
    lines = list(a.protocol.differences(b.protocol))
    if a.weights != b.weights:
        mine, theirs = (f"{one.model} ({short(one.weights)})" for one in (a, b))
        lines.insert(0, f"model: {mine} against {theirs}")
    return lines


def _incomparable(a: Side, b: Side, differences: Sequence[str]) -> ConfigError:
    alike = a.weights == b.weights
    move = ALIKE if alike else "Compare each with its own dense run: `pareto` shows its gains."
    hashes = " and ".join(short(one.protocol.hash) for one in (a, b))
    listed = "".join(f"\n  {line}" for line in differences)
    return ConfigError(
        f"A ({a.name}) and B ({b.name}) cannot be compared: figures of two models or two protocols "
        f"({hashes}) are on two scales. They differ in{listed}\n{move}"
    )


def compare_sides(a: Side, b: Side) -> Comparison:
    """Compare two points in every figure both have.

    Raises:
        ConfigError: they are of two models or two protocols.
    """
    check_comparable(a, b)
    rows: list[Row] = []
    notes: list[str] = []
    speeds = (*_comparable_counts(a, b, notes), *_comparable_times(a, b, notes))
    for figure in (*speeds, *IMAGE_FIGURES):
        if figure in a.figures and figure in b.figures:
            mine, theirs = a.figures[figure], b.figures[figure]
            told = _difference(figure, a, b)
            rows.append(Row(figure=figure, scorer=mine.scorer, a=mine, b=theirs, difference=told))
    if a.evaluation == b.evaluation:
        notes.append("A and B are the same SubNet, evaluated once")
    return Comparison(a=a, b=b, rows=tuple(rows), notes=tuple(notes))


def compare_all(pairs: Iterable[tuple[Side, Side]]) -> tuple[tuple[Comparison, ...], list[str]]:
    """Compare the pairs that may be compared; of each of the others say what differs.

    Raises:
        ConfigError: none of them may be.
    """
    found: list[Comparison] = []
    left_out: list[str] = []
    refused: ConfigError | None = None
    for a, b in pairs:
        differences = _differences(a, b)
        if differences:
            refused = refused or _incomparable(a, b, differences)
            left_out.append(f"{a.name} is not compared: {'; '.join(differences)}")
        else:
            found.append(compare_sides(a, b))
    if refused is not None and not found:
        raise refused
    return tuple(found), left_out


def matching_points(
    ours: Iterable[ResolvedPoint], theirs: Iterable[ResolvedPoint]
) -> list[tuple[ResolvedPoint, ResolvedPoint]]:
    """Pair points of two sweeps that are the same way to run a model; evaluated ones only."""
    known = {_way(point): point for point in theirs if point.is_evaluated}
    mine = {_way(point): point for point in ours if point.is_evaluated}
    return [(point, known[way]) for way, point in mine.items() if way in known]


# ---------------------------------------------------------------------------------------------


def _way(point: ResolvedPoint) -> str:
    names = ["method", "strategy", "loss", "seed", "target", "variant", "sampler"]
    if point.method in ("search", "random"):  # others keep or skip whole calls
        names.append("granularity")
    return content_key({name: canonical(getattr(point, name)) for name in names})


def _speeds(point: ResolvedPoint) -> dict[str, Figure]:
    speeds = {}
    for name in (*COUNTED, *TIMES):
        value, (low, high) = point.value(name), point.bounds(name)
        if value is not None:
            speeds[name] = Figure(value, low, high, 0)
    return speeds


def _figures_of_file(metrics: Mapping[str, Any], protocol: Protocol) -> dict[str, Figure]:
    counts = _mapping(metrics.get("n", {}), "metrics.n")
    scorers = _mapping(metrics.get("scorers", {}), "metrics.scorers")
    figures: dict[str, Figure] = {}
    for name in (*COUNTED, *TIMES, *IMAGE_FIGURES):
        value, low, high = (_number(metrics, name + end) for end in ("", "_low", "_high"))
        if value is not None:
            n, scorer = int(_number(counts, name) or 0), scorers.get(name)
            figures[name] = Figure(value, low, high, n, scorer, protocol.hash)
    return figures


def _number(values: Mapping[str, Any], name: str) -> float | None:
    """Return a number of a file, None where it has none; speeds are above zero."""
    value = values.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if value <= 0 and name.startswith((*COUNTED, *TIMES)):
        raise ValueError(f"{name} must be above zero, got {value!r}")
    return float(value)


def _mapping(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f"{place} must be an object, got {value!r}")
    return value


def _mapping_or_none(value: object, place: str) -> Mapping[str, Any] | None:
    return None if value is None else _mapping(value, place)


def _comparable_counts(a: Side, b: Side, notes: list[str]) -> Sequence[str]:
    """Return the names of counted figures if both count alike; else note that they do not."""
    if a.convention == b.convention:
        return COUNTED
    notes.append(
        f"MACs are not compared: macs_convention: {a.convention!r} against {b.convention!r}"
    )
    return ()


def _comparable_times(a: Side, b: Side, notes: list[str]) -> Sequence[str]:
    """Return the names of latency figures if they may be compared; else note why not."""
    if a.conditions is None or b.conditions is None:
        missing = " and ".join(s for s, one in (("A", a), ("B", b)) if one.conditions is None)
        notes.append(f"latency is not compared: it was not measured for {missing}")
        return ()
    names = sorted(a.conditions.keys() | b.conditions.keys())
    both = [(name, a.conditions.get(name), b.conditions.get(name)) for name in names]
    differ = [f"{name}: {mine!r} against {its!r}" for name, mine, its in both if mine != its]
    if differ:
        notes.append(f"latency is not compared: {'; '.join(differ)}")
    return () if differ else TIMES


def _difference(figure: str, a: Side, b: Side) -> Difference:
    mine, theirs = a.figures[figure], b.figures[figure]
    if figure not in IMAGE_FIGURES:
        return _ratio(figure, mine, theirs)
    value = theirs.value - mine.value
    if a.evaluation == b.evaluation:
        return _told(figure, Interval(0.0, 0.0, 0.0), paired=True)
    found = _paired(figure, a, b)
    if found is not None:
        return _told(figure, containing(found, value), paired=True)
    known = _interval(mine), _interval(theirs)
    if known[0] is None or known[1] is None:
        return Difference(
            kind="difference", value=value, low=None, high=None, paired=False, better=None
        )
    return _told(figure, unpaired_gap(known[1], known[0]), paired=False)


def _paired(figure: str, a: Side, b: Side) -> Interval | None:
    """Return B - A of the same prompts and noise, where both sides' arrays are there."""
    if figure not in QUALITIES:
        return None
    mine, theirs = a.replicates(figure), b.replicates(figure)
    return None if mine is None or theirs is None else interval_of(difference_of(theirs, mine))


def _ratio(figure: str, a: Figure, b: Figure) -> Difference:
    """Return B / A; the two measurements are independent of each other."""
    mine, theirs = (_bounded(figure, one) for one in (a, b))
    if mine is None or theirs is None:
        return Difference(
            kind="ratio", value=b.value / a.value, low=None, high=None, paired=False, better=None
        )
    gap = unpaired_ratio(theirs, mine)
    told = _told(figure, gap, paired=False)
    value, low, high = (math.exp(part) for part in (gap.value, gap.low, gap.high))
    return replace(told, kind="ratio", value=value, low=low, high=high)


def _told(figure: str, found: Interval, *, paired: bool) -> Difference:
    """Return a difference with what it says: whose figure is surely better."""
    better: Literal["A", "B"] | None = None
    if found.low > 0:
        better = "A" if FIGURES[figure].lower_is_better else "B"
    elif found.high < 0:
        better = "B" if FIGURES[figure].lower_is_better else "A"
    return Difference(
        kind="difference",
        value=found.value,
        low=found.low,
        high=found.high,
        paired=paired,
        better=better,
    )


def _interval(figure: Figure) -> Interval | None:
    if figure.low is None or figure.high is None:
        return None
    return Interval(figure.value, figure.low, figure.high)


def _bounded(figure: str, known: Figure) -> Interval | None:
    """Return a figure with its bounds; a counted one is exact."""
    return Interval(*(known.value,) * 3) if FIGURES[figure].counted else _interval(known)
