"""What was measured, as tables: points by protocol, what a race dropped, latencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.metrics import IMAGE_FIGURES, figure_text, label_of
from orchestrator.pareto import name_at_target
from orchestrator.points import ResolvedPoint
from orchestrator.records import Record
from orchestrator.report.wording import plain
from orchestrator.speeds import TIMES, latency_conditions

Records = Mapping[str, Record]
#: What is shown of a latency measurement.
TIMED = (*TIMES, "peak_memory_mb", "energy_j")


@dataclass(frozen=True, kw_only=True)
class PointTable:
    """All points of one protocol, and the figures that were measured under it.

    columns: (figure, id of its scorer).
    """

    protocol: str
    models: tuple[str, ...]
    columns: tuple[tuple[str, str | None], ...]
    points: tuple[ResolvedPoint, ...]


@dataclass(frozen=True, kw_only=True)
class DroppedRow:
    """A point that a race took out. by: metric with its scorer -> name of who surely beats it."""

    point: ResolvedPoint
    images: int
    by: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class RaceTable:
    """What racing one model saved: images made, and those that all points would have taken."""

    model: str
    images: int
    without: int
    rows: tuple[DroppedRow, ...]


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """What was timed of one model under the same conditions, in words.

    figures: those that some point has. batches: batch sizes of which throughput is known. rows: a
    point, and its images per second at each of them.
    """

    model: str
    conditions: str
    figures: tuple[str, ...]
    batches: tuple[str, ...]
    rows: tuple[tuple[ResolvedPoint, tuple[str, ...]], ...]


def columns_of(
    points: Iterable[ResolvedPoint], figures: Sequence[str] = IMAGE_FIGURES
) -> tuple[tuple[str, str | None], ...]:
    """Return each (figure, scorer) that some point was measured by: two scorers are two columns."""
    found = dict.fromkeys(
        (name, known.scorer) for point in points for name, known in point.figures.items()
    )
    return tuple(sorted((c for c in found if c[0] in figures), key=lambda c: figures.index(c[0])))


def point_tables(points: Iterable[ResolvedPoint]) -> tuple[PointTable, ...]:
    """Return one table a protocol: figures of two protocols never share one."""
    groups: dict[str, list[ResolvedPoint]] = {}
    for point in points:
        groups.setdefault(point.measured_under, []).append(point)
    return tuple(
        PointTable(
            protocol=protocol,
            models=tuple(dict.fromkeys(point.model for point in group)),
            columns=columns_of(group),
            points=tuple(group),
        )
        for protocol, group in groups.items()
    )


def race_tables(points: Sequence[ResolvedPoint]) -> tuple[RaceTable, ...]:
    """Return one table a model of which a race has dropped points."""
    models = dict.fromkeys(point.model for point in points if point.dropped is not None)
    return tuple(_race_table(model, [p for p in points if p.model == model]) for model in models)


def _race_table(model: str, points: Sequence[ResolvedPoint]) -> RaceTable:
    by_key = {point.key: point for point in points}
    measured = {point.identity: point.n_images or 0 for point in points if point.is_evaluated}
    rows = []
    for point in points:
        if point.dropped is not None:
            by = {
                label_of(metric, point.scorer(metric)): name_at_target(by_key[key])
                for metric, key in point.dropped.by.items()
            }
            rows.append(DroppedRow(point=point, images=point.dropped.images, by=by))
    return RaceTable(
        model=model,
        images=sum(measured.values()),
        without=max(measured.values()) * len(measured),
        rows=tuple(rows),
    )


def latency_tables(points: Iterable[ResolvedPoint], records: Records) -> tuple[LatencyTable, ...]:
    """Return one table a model and set of conditions: latencies of two are never compared."""
    groups: dict[tuple[str, str], list[ResolvedPoint]] = {}
    for point in points:
        record = records.get(point.latency_key or "")
        if record is not None:
            words = plain(latency_conditions(record))
            groups.setdefault((point.model, words), []).append(point)
    return tuple(
        _latency_table(model, words, list({p.latency_key: p for p in group}.values()))
        for (model, words), group in groups.items()
    )


def _latency_table(model: str, words: str, points: Sequence[ResolvedPoint]) -> LatencyTable:
    batches = sorted({size for point in points for size in point.throughput}, key=int)
    rows = tuple((point, tuple(_rate(point, size) for size in batches)) for point in points)
    known = (name for name in TIMED if any(p.value(name) is not None for p in points))
    return LatencyTable(
        model=model,
        conditions=words,
        figures=tuple(known),
        batches=tuple(batches),
        rows=rows,
    )


def _rate(point: ResolvedPoint, batch: str) -> str:
    rate = point.throughput.get(batch)
    if rate is None:
        return ""
    return figure_text("images_per_second", rate["value"], rate["low"], rate["high"])
