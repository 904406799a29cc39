"""The points as CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from orchestrator.bars import CALIBRATION_METRICS
from orchestrator.headlines import Headline, statements
from orchestrator.pareto import Front, pareto_json
from orchestrator.points import ResolvedPoint
from orchestrator.report.measured import columns_of
from orchestrator.search_cost import SPENT

#: Columns of points.csv; image figures, gains and standings follow, as far as they were measured.
COLUMNS = (
    "key", "model", "model_id", "method", "name", "strategy", "granularity", "target",
    "seed", "variant", "state",
    "measured_under", "n_images", "pruned_ratio", "macs", "macs_speedup", "device",
    "latency_usable",
    "latency_note", "latency_ms", "latency_ms_low", "latency_ms_high", "speedup", "speedup_low",
    "speedup_high", "loop_ms", "loop_ms_low", "loop_ms_high", "loop_speedup", "loop_speedup_low",
    "loop_speedup_high", "peak_memory_mb", "energy_j", "all_or_nothing_share", "verdict", "subnet",
    "error",
)  # fmt: skip
ENDS = ("", "_low", "_high")


def points_csv(points: Sequence[ResolvedPoint], fronts: Sequence[Front]) -> str:
    """Return one line a point; the header names the network behind each figure.

    A figure by two networks has two columns. standing: on the front of that metric.
    """
    measured = columns_of(points)
    gained = [column for column in measured if any(column[0] in p.gain for p in points)]
    fronted = [c for c in measured if any(f.objectives[1] == c[0] for f in fronts)]
    sizes = sorted({size for point in points for size in point.throughput}, key=int)
    calibrated = _calibrated(points)
    header = [
        *COLUMNS,
        *calibrated,
        *(f"search_{name}" for name in SPENT),
        *(f"images_per_second batch {size}{end}" for size in sizes for end in ENDS),
        *(_scored(f"{m}{end}", scorer) for m, scorer in measured for end in (*ENDS, "_n")),
        *(_scored(f"gain_{m}{end}", scorer) for m, scorer in gained for end in ENDS),
        *(_scored(f"standing_{m}", scorer) for m, scorer in fronted),
        "baseline_key",
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["protocol" if name == "measured_under" else name for name in header])
    for point in points:
        baseline = next((gain.baseline_key for gain in point.gain.values()), None)
        row = [getattr(point, name) for name in (*COLUMNS, *calibrated)]
        row += [getattr(point.search_cost, name, None) for name in SPENT]
        row += [point.throughput.get(s, {}).get(e) for s in sizes for e in ("value", "low", "high")]
        row += [cell for column in measured for cell in _figure_cells(point, column)]
        row += [cell for column in gained for cell in _gain_cells(point, column)]
        row += [_standing(point, column, fronts) for column in fronted]
        writer.writerow([*row, baseline])
    return buffer.getvalue()


def _calibrated(points: Sequence[ResolvedPoint]) -> list[str]:
    """Return the columns of calibration figures that some point has."""
    names = (f"calibration_{metric}" for metric in CALIBRATION_METRICS)
    return [name for name in names if any(getattr(p, name) is not None for p in points)]


Column = tuple[str, str | None]


def _scored(name: str, scorer: str | None) -> str:
    return name if scorer is None else f"{name} ({scorer})"


def _figure_cells(point: ResolvedPoint, column: Column) -> list[float | None]:
    figure = point.figures.get(column[0])
    if figure is None or figure.scorer != column[1]:
        return [None] * 4
    return [figure.value, figure.low, figure.high, figure.n]


def _gain_cells(point: ResolvedPoint, column: Column) -> list[float | None]:
    gain = point.gain.get(column[0])
    if gain is None or point.scorer(column[0]) != column[1]:
        return [None] * 3
    return [gain.value, gain.low, gain.high]


def _standing(point: ResolvedPoint, column: Column, fronts: Sequence[Front]) -> str | None:
    for front in fronts:
        if (front.objectives[1], front.scorer) == column and point.key in front.standing:
            return front.standing[point.key]
    return None


def points_json(
    points: Sequence[ResolvedPoint], fronts: Sequence[Front], lines: Sequence[Headline]
) -> str:
    shown = [line.to_json() for line in lines]
    document = pareto_json(points, fronts, shown, statements(lines, points))
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
