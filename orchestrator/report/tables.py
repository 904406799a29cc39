"""The points as CSV, JSON and Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any

from orchestrator.metrics import FIGURES, QUALITIES
from orchestrator.pareto import Front, pareto_json
from orchestrator.points import ResolvedPoint
from orchestrator.report.sections import Claim, Cost, Failure, HeadlineRow

#: Columns of points.csv; gains follow, one group of four a metric.
COLUMNS = (
    "key", "model", "model_id", "method", "name", "strategy", "target", "seed", "variant", "state",
    "n_images", "pruned_ratio", "macs", "macs_speedup",
    "latency_ms", "latency_ms_low", "latency_ms_high", "speedup", "speedup_low", "speedup_high",
    *(f"{metric}{end}" for metric in QUALITIES for end in ("", "_low", "_high")),
    "all_or_nothing_share", "calibration_psnr", "calibration_ssim",
    "calibration_clip", "verdict", "device", "protocol", "subnet", "error",
)  # fmt: skip


def points_csv(points: Iterable[ResolvedPoint]) -> str:
    """Return one line a point."""
    gains = [(metric, end) for metric in QUALITIES for end in ("value", "low", "high")]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, *(f"gain_{m}_{end}" for m, end in gains), "baseline_key"])
    for point in points:
        found = [getattr(point.gain.get(metric), end, None) for metric, end in gains]
        baseline = next((gain.baseline_key for gain in point.gain.values()), None)
        writer.writerow([*(getattr(point, name) for name in COLUMNS), *found, baseline])
    return buffer.getvalue()


def points_json(points: Sequence[ResolvedPoint], fronts: Sequence[Front]) -> str:
    return json.dumps(pareto_json(points, fronts), indent=1, allow_nan=False) + "\n"


def report_markdown(
    name: str,
    quality: str,
    rows: Sequence[HeadlineRow],
    points: Sequence[ResolvedPoint],
    fronts: Sequence[Front],
    spent: Sequence[Cost],
    failed: Sequence[Failure],
) -> str:
    """Return the report's text: headline, fronts, all points, costs, failures."""
    parts = [
        f"# Report of {name}",
        "",
        "![Pareto fronts](pareto.png)",
        "",
        f"## Searched SubNets against the best trivial baseline ({FIGURES[quality].label})",
        "",
        "Gain > 0: the searched SubNet is better; 95 % interval in brackets, paired by prompt. "
        "Baselines have at least the same compute and are chosen on calibration prompts. "
        "Speed-up is measured, MACs speed-up is counted.",
        "",
        *_headline_table(rows),
        "",
        "## Fronts",
        "",
        *_front_table(points, fronts),
        "",
        "## All points",
        "",
        *_point_table(points),
        "",
        "## Costs",
        "",
        *_table(
            ("kind", "tasks", "task-seconds", "denoiser forwards"),
            [(c.kind, str(c.tasks), f"{c.seconds:.0f}", str(c.forwards or "")) for c in spent],
        ),
    ]
    if failed:
        causes = [(", ".join(f.points), f.cause) for f in failed]
        parts += ["", "## Failed", "", *_table(("points", "cause"), causes)]
    return "\n".join(parts) + "\n"


def _headline_table(rows: Sequence[HeadlineRow]) -> list[str]:
    head = (
        "model", "target", "searched", "speed-up", "MACs speed-up", "best trivial baseline",
        "against it", "against random", "chosen",
    )  # fmt: skip
    body = [
        (
            row.model,
            row.target,
            row.searched.name,
            row.searched.figure_text("speedup"),
            row.searched.figure_text("macs_speedup"),
            row.baseline.name if row.baseline else "",
            _claim_text(row.against_baseline),
            _claim_text(row.against_random),
            row.note,
        )
        for row in rows
    ]
    return _table(head, body)


def _claim_text(claim: Claim | None) -> str:
    return "" if claim is None else f"**{claim.verdict}** {claim.text}"


def _front_table(points: Sequence[ResolvedPoint], fronts: Sequence[Front]) -> list[str]:
    names = {p.key: p.name + ("" if p.target is None else f" at {p.target:g}") for p in points}
    body = [
        (
            front.model,
            front.device or "",
            " / ".join(FIGURES[objective].label for objective in front.objectives),
            ", ".join(names[key] for key in front.points),
            names.get(front.knee or "", ""),
            f"{front.hypervolume:.3g}",
            "({:.3g}, {:.3g})".format(*front.reference_point),
        )
        for front in fronts
    ]
    head = ("model", "device", "objectives", "front, slowest first", "knee", "hypervolume",
            "reference point")  # fmt: skip
    return _table(head, body)


def _point_table(points: Sequence[ResolvedPoint]) -> list[str]:
    figures = ("macs_speedup", "speedup", "latency_ms", *QUALITIES)
    body = [
        (
            p.model,
            p.name,
            "" if p.target is None else f"{p.target:g}",
            p.state,
            str(p.n_images or ""),
            "" if p.pruned_ratio is None else f"{p.pruned_ratio:.3f}",
            *(p.figure_text(figure) for figure in figures),
        )
        for p in points
    ]
    head = ("model", "point", "target", "state", "n", "pruned ratio")
    return _table((*head, *(FIGURES[f].label for f in figures)), body)


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in body]
    lines = ["| " + " | ".join(row) + " |" for row in [list(head), *rows]]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]
