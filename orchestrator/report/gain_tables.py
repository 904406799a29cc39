"""What each searched point gains over each trivial baseline at its compute, as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.metrics import QUALITIES, label_of
from orchestrator.pareto import name_at_target
from orchestrator.points import ResolvedPoint
from orchestrator.report.measured import columns_of


@dataclass(frozen=True, kw_only=True)
class GainCell:
    """One gain as it is shown. best: whether the baseline is the one to beat in this metric."""

    verdict: str
    text: str
    best: bool


@dataclass(frozen=True, kw_only=True)
class GainTable:
    """Searched points of one model and protocol against each baseline.

    columns: labels of metrics. rows: names of point and baseline, a cell a column, None where there
    is no gain.
    """

    model: str
    protocol: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, str, tuple[GainCell | None, ...]], ...]


def gain_tables(points: Sequence[ResolvedPoint]) -> tuple[GainTable, ...]:
    """Return one table a model and protocol that has a searched point with gains."""
    by_key = {point.key: point for point in points}
    groups: dict[tuple[str, str], list[ResolvedPoint]] = {}
    for point in points:
        if point.gain_over:
            groups.setdefault((point.model, point.measured_under), []).append(point)
    return tuple(_gain_table(*where, group, by_key) for where, group in groups.items())


def _gain_table(
    model: str,
    protocol: str,
    points: Sequence[ResolvedPoint],
    by_key: Mapping[str, ResolvedPoint],
) -> GainTable:
    columns = columns_of(points, QUALITIES)
    return GainTable(
        model=model,
        protocol=protocol,
        columns=tuple(label_of(*column) for column in columns),
        rows=tuple(
            (
                name_at_target(point),
                by_key[key].name,
                tuple(_cell(point, key, *column) for column in columns),
            )
            for point in points
            for key in point.gain_over
        ),
    )


def _cell(point: ResolvedPoint, baseline: str, metric: str, scorer: str | None) -> GainCell | None:
    gain = point.gain_over[baseline].get(metric)
    if gain is None or point.scorer(metric) != scorer:
        return None
    bar = point.gain.get(metric)
    best = bar is not None and bar.baseline_key == baseline
    return GainCell(verdict=gain.verdict, text=gain.text(metric), best=best)
