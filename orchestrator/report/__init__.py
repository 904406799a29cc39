"""The report of a sweep: report.html (one file, works offline), pareto.png, CSV, JSON, Markdown."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from orchestrator.figures import fronts_figure, to_png
from orchestrator.headlines import headlines, statements
from orchestrator.metrics import FIGURES, IMAGE_FIGURES, label_of
from orchestrator.pareto import Front, front_table, knee_note, share_text
from orchestrator.points import ResolvedPoint
from orchestrator.protocol_text import short
from orchestrator.report.front_svg import front_svg, legend_entries
from orchestrator.report.gain_tables import gain_tables
from orchestrator.report.gates_svg import gates_svg
from orchestrator.report.markdown import ReportText, report_markdown
from orchestrator.report.measured import latency_tables, point_tables, race_tables
from orchestrator.report.sections import (
    costs,
    failures,
    gate_cards,
    headline_rows,
    image_rows,
    protocols,
    rested_on,
    title,
)
from orchestrator.report.tables import points_csv, points_json
from orchestrator.store import Store
from orchestrator.sweep_settings import SweepFile

FILES = ("report.html", "pareto.png", "points.csv", "points.json", "report.md")
#: Metrics of pareto.png; report.html draws all.
DRAWN = ("fid", "clip", "psnr")
#: What report.html and report.md say alike.
SHARED = (
    *("statements", "headlines", "gains", "races", "tables", "latencies", "protocols", "costs"),
    "failures",
)


def write_report(
    sweep: SweepFile,
    points: Sequence[ResolvedPoint],
    fronts: Sequence[Front],
    store: Store,
    folder: str | os.PathLike[str],
) -> Path:
    """Write all files of the report into `folder` and return the path of report.html.

    Each file is replaced whole, report.html last; a report may be written while the sweep runs.
    Nothing is written if the report there shows the same.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    lines = headlines(points, sweep.objective.quality)
    document = points_json(points, fronts, lines)
    mark = _mark(sweep, document)
    if _is_written(target, mark):
        return target / "report.html"
    content = {**_content(sweep, points, fronts, store), "mark": mark}
    drawn = [front for front in fronts if front.objectives[1] in DRAWN]
    png = to_png(fronts_figure(points, drawn or fronts))
    texts = {
        "points.csv": points_csv(points, fronts),
        "points.json": document,
        "report.md": report_markdown(
            ReportText(
                name=sweep.name,
                points=points,
                fronts=fronts,
                **{part: content[part] for part in SHARED},
            )
        ),
        "report.html": _render({**content, "png": _data_uri(png)}),
    }
    _write(target / "pareto.png", png)
    for name, text in texts.items():
        _write(target / name, text.encode())
    return target / "report.html"


def _mark(sweep: SweepFile, document: str) -> str:
    """Return a digest of all that the report shows and of how it shows it."""
    templates = Path(__file__).parents[1] / "templates"
    parts = [sweep.digest, version("dipgo-sweep"), document]
    parts += [path.read_text(encoding="utf-8") for path in sorted(templates.iterdir())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _is_written(folder: Path, mark: str) -> bool:
    if not all((folder / name).exists() for name in FILES):
        return False
    with (folder / "report.html").open(encoding="utf-8") as file:
        return mark in file.read(2000)


def _content(
    sweep: SweepFile, points: Sequence[ResolvedPoint], fronts: Sequence[Front], store: Store
) -> dict[str, Any]:
    """Gather everything the template shows."""
    records = rested_on(points, store.records(), store)
    rows = headline_rows(points, sweep.objective.quality)
    return {
        "name": sweep.name,
        "digest": sweep.digest,
        "version": version("dipgo-sweep"),
        "quality_key": sweep.objective.quality,
        "label_of": label_of,
        "short": short,
        "legend": [(Markup(icon), label) for icon, label in legend_entries(points)],
        "convention": sweep.macs_convention,
        "states": Counter(point.state for point in points),
        "headlines": rows,
        "statements": statements(headlines(points, sweep.objective.quality), points),
        "gains": gain_tables(points),
        "share_text": share_text,
        "labels": list(dict.fromkeys(row.label for row in rows)),
        "fronts": _front_sections(points, fronts),
        "images": [
            (shown, [(role, name, _data_uri(png)) for role, name, png in shown.rows])
            for shown in image_rows(rows, points, records, store)
        ],
        "gates": [(card, Markup(gates_svg(card.subnet))) for card in gate_cards(points, records)],
        "points": points,
        "races": race_tables(points),
        "tables": point_tables(points),
        "latencies": latency_tables(points, records),
        "figures": FIGURES,
        "methods": list(dict.fromkeys(point.method for point in points)),
        "models": list(dict.fromkeys(point.model for point in points)),
        "costs": costs(records.values()),
        "failures": failures(points),
        "protocols": protocols(points, records),
        "tips": _script_json({point.key: _tip(point) for point in points}),
    }


def _front_sections(
    points: Sequence[ResolvedPoint], fronts: Sequence[Front]
) -> list[dict[str, Any]]:
    """Return the drawings of each model, protocol and device."""
    groups: dict[tuple[str, str, str | None], list[Front]] = {}
    for front in fronts:
        groups.setdefault((front.model, front.protocol, front.device), []).append(front)
    return [
        {
            "model": model,
            "device": device,
            "protocol": protocol,
            "fronts": [
                (
                    front,
                    front_table(points, front),
                    Markup(front_svg(points, front)),
                    knee_note(points, front),
                )
                for front in group
            ],
        }
        for (model, protocol, device), group in groups.items()
    ]


def _tip(point: ResolvedPoint) -> dict[str, Any]:
    """Return what a tooltip says of a point."""
    names = ("speedup", "macs_speedup", *IMAGE_FIGURES)
    shown = [figure for figure in names if point.value(figure) is not None]
    lines = [
        f"{label_of(figure, point.scorer(figure))}: {point.figure_text(figure)}" for figure in shown
    ]
    lines += [
        f"gain in {label_of(name, point.scorer(name))}: {gain.text(name)} ({gain.verdict})"
        for name, gain in point.gain.items()
    ]
    lines.append(f"n = {point.n_images}, protocol {short(point.measured_under)}")
    return {"title": title(point), "method": point.method, "model": point.model, "lines": lines}


def _render(content: Mapping[str, Any]) -> str:
    environment = Environment(
        loader=PackageLoader("orchestrator"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(**content)


def _script_json(value: Any) -> Markup:
    """Return JSON that is safe inside a script element."""
    text = json.dumps(value, ensure_ascii=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    temporary.replace(path)
