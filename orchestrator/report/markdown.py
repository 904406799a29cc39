"""The report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.metrics import FIGURES, label_of
from orchestrator.pareto import Front, front_table, knee_note, name_at_target, share_text
from orchestrator.points import ResolvedPoint
from orchestrator.protocol_text import short
from orchestrator.report.gain_tables import GainCell, GainTable
from orchestrator.report.measured import LatencyTable, PointTable, RaceTable
from orchestrator.report.sections import Claim, Cost, Failure, HeadlineRow, ProtocolText


@dataclass(frozen=True, kw_only=True)
class ReportText:
    """What report.md says, as values."""

    name: str
    statements: Sequence[str]
    gains: Sequence[GainTable]
    headlines: Sequence[HeadlineRow]
    races: Sequence[RaceTable]
    points: Sequence[ResolvedPoint]
    fronts: Sequence[Front]
    tables: Sequence[PointTable]
    latencies: Sequence[LatencyTable]
    protocols: Sequence[ProtocolText]
    costs: Sequence[Cost]
    failures: Sequence[Failure]


def report_markdown(text: ReportText) -> str:
    """Return the report's text: headlines, fronts, all points, latency, costs, protocols."""
    parts = [f"# Report of {text.name}", "", "![Pareto fronts](pareto.png)", ""]
    parts += [line for sentence in text.statements for line in (sentence, "")]
    for label in dict.fromkeys(row.label for row in text.headlines):
        parts += [f"## Searched SubNets against the best trivial baseline: {label}", ""]
        parts += _headline_table([row for row in text.headlines if row.label == label])
        parts += [""]
    parts += _gain_section(text.gains)
    parts += ["## Fronts", "", STANDING, ""]
    for front in text.fronts:
        parts += [_front_title(front), "", *_front_table(text.points, front), ""]
    parts += ["## All points", ""]
    for table in text.tables:
        models = ", ".join(table.models)
        parts += [f"### {models}, protocol {short(table.protocol)}", "", *_point_table(table), ""]
    parts += _race_section(text.races)
    parts += _latency_section(text.latencies)
    spent = [(c.kind, str(c.tasks), f"{c.seconds:.0f}", str(c.forwards or "")) for c in text.costs]
    parts += ["## Costs", ""]
    parts += _table(("kind", "tasks", "task-seconds", "denoiser forwards"), spent)
    if text.failures:
        causes = [(", ".join(f.points), f.cause) for f in text.failures]
        parts += ["", "## Failed", "", *_table(("points", "cause"), causes)]
    parts += ["", "## Protocols", "", "Figures of two protocols are never compared.", ""]
    for one in text.protocols:
        parts += _protocol_part(one, text.protocols[0])
    return "\n".join(parts).rstrip() + "\n"


HEADLINE = (
    "Gain > 0: the searched SubNet is better; 95 % interval in brackets, paired by prompt. "
    "Baselines have at least the same compute and are chosen on calibration prompts. "
    "Speed-up is measured, MACs speed-up is counted."
)
RACING = (
    "Points that others at least as fast surely beat in every raced metric, by bounds that hold "
    "for all comparisons of the race together, got no more images; they are on no front, and their "
    "figures are of the images they had."
)
STANDING = (
    "*surely*: no other point may be better in both, given the 95 % intervals of the differences "
    "(paired by prompt); *possibly*: some other may be; a point that some other surely dominates "
    "is not listed. Rows in brackets are not on the line through the figures themselves."
)


def _headline_table(rows: Sequence[HeadlineRow]) -> list[str]:
    head = (
        "model", "protocol", "target", "searched", "speed-up", "MACs speed-up",
        "gain over the best trivial baseline, by metric", "against random",
        "all-or-nothing calls", "search cost", "chosen",
    )  # fmt: skip
    body = [
        (
            row.model,
            short(row.protocol),
            row.target,
            row.searched.name,
            row.searched.figure_text("speedup"),
            row.searched.figure_text("macs_speedup"),
            _claims_text(row),
            _claim_text(row.against_random),
            share_text(row.searched),
            row.searched.search_cost.text if row.searched.search_cost else "",
            row.note,
        )
        for row in rows
    ]
    return [HEADLINE, "", *_table(head, body)]


def _claims_text(row: HeadlineRow) -> str:
    """Name every metric with its gain and the baseline that is best in it."""
    told = [f"{c.metric} {_claim_text(c)} ({c.baseline})" for c in row.claims]
    return "; ".join(told if row.against_baseline else [f"{row.label}: not known yet", *told])


def _claim_text(claim: Claim | None) -> str:
    return "" if claim is None else f"**{claim.verdict}** {claim.text}"


def _front_title(front: Front) -> str:
    where = f" on {front.device}" if front.device else ""
    speed, quality = front.objectives
    axes = f"{FIGURES[speed].label} / {label_of(quality, front.scorer)}"
    return f"### {front.model}{where}: {axes}, protocol {short(front.protocol)}"


def _front_table(points: Sequence[ResolvedPoint], front: Front) -> list[str]:
    body = [
        (
            " = ".join(row.names) if row.on_line else f"({' = '.join(row.names)})",
            row.speedup,
            row.quality,
            row.standing,
            f"{row.verdict} {row.gain}".strip(),
            "knee" if row.knee else "",
            row.share,
            row.cost,
        )
        for row in front_table(points, front)
    ]
    speed, quality = front.objectives
    head = (
        "point", FIGURES[speed].label, label_of(quality, front.scorer), "on the front",
        "gain over the best baseline", "", "all-or-nothing calls", "search cost",
    )  # fmt: skip
    volume = f"Hypervolume {front.hypervolume:.3g} from "
    volume += "({:.3g}, {:.3g}).".format(*front.reference_point)
    notes = [f"{note}." for note in [knee_note(points, front)] if note]
    notes += [front.racing_note] if front.racing_note else []
    return [*_table(head, body), "", " ".join([volume, *notes])]


def _point_table(table: PointTable) -> list[str]:
    speeds = ("macs_speedup", "speedup", "latency_ms")
    figures = (*speeds, *(figure for figure, _ in table.columns))
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
        for p in table.points
    ]
    head = ("model", "point", "target", "state", "n", "pruned ratio")
    labels = [*(FIGURES[f].label for f in speeds), *(label_of(*c) for c in table.columns)]
    return _table((*head, *labels), body)


def _protocol_part(one: ProtocolText, first: ProtocolText) -> list[str]:
    parts = [
        f"### {', '.join(one.models)}: `{one.hash}`",
        "",
        *_table(("what", "is"), one.rows),
        "",
    ]
    if one.differences:
        differences = "; ".join(one.differences)
        parts += [f"Against {short(first.hash)} it differs in {differences}.", ""]
    return parts


def _gain_section(tables: Sequence[GainTable]) -> list[str]:
    """Say what each searched SubNet gains over each baseline; an asterisk marks the one to beat."""
    if not tables:
        return []
    parts = ["## Gain over each trivial baseline", "", "\\*: the baseline to beat.", ""]
    for table in tables:
        body = [
            (name, baseline, *(_gain_cell(cell) for cell in cells))
            for name, baseline, cells in table.rows
        ]
        parts += [f"### {table.model}, protocol {short(table.protocol)}", ""]
        parts += [*_table(("searched", "baseline", *table.columns), body), ""]
    return parts


def _gain_cell(cell: GainCell | None) -> str:
    if cell is None:
        return ""
    return f"{cell.verdict} {cell.text}" + (" \\*" if cell.best else "")


def _race_section(races: Sequence[RaceTable]) -> list[str]:
    if not races:
        return []
    parts = ["## Racing", "", RACING, ""]
    for race in races:
        body = [
            (name_at_target(row.point), str(row.images), "; ".join(map(": ".join, row.by.items())))
            for row in race.rows
        ]
        parts += [f"### {race.model}: {race.images} images made instead of {race.without}", ""]
        parts += [*_table(("dropped", "at n", "surely beaten by"), body), ""]
    return parts


def _latency_section(tables: Sequence[LatencyTable]) -> list[str]:
    if not tables:
        return []
    parts = ["## Latency", "", "Figures under other conditions are never compared.", ""]
    for table in tables:
        head = ["point", *(FIGURES[figure].label for figure in table.figures)]
        head += [f"images per second, batch {size}" for size in table.batches]
        body = [
            (
                name_at_target(p),
                *(p.figure_text(figure) for figure in table.figures),
                *rates,
                p.latency_note or "",
            )
            for p, rates in table.rows
        ]
        parts += [f"### {table.model}: {table.conditions}", ""]
        parts += [*_table([*head, "note"], body), ""]
    return parts


def _table(head: Sequence[str], body: Iterable[Sequence[Any]]) -> list[str]:
    rows = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in body]
    lines = ["| " + " | ".join(row) + " |" for row in [list(head), *rows]]
    return [lines[0], "|" + " --- |" * len(head), *lines[1:]]
