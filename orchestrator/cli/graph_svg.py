"""`models show -o FILE.svg`: a block graph as a drawing of its own, for any browser."""

from __future__ import annotations

import os
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from dipgo_core.errors import ConfigError
from orchestrator.cli.model_graph import MOST_RAILS, BlockRow, reads_text, rows_of
from orchestrator.cli.rails import Rail, rails_of
from orchestrator.cli.show import megabytes

if TYPE_CHECKING:
    from dipgo_core.outline import Outline

ROW = 20
RAIL = 12
TOP = 44
LEFT = 14
BAR = 90
CHARACTER = 6.7  # width of one at 11 px
_COLOURS = {"output": "#2b6cb0", "residual": "#b7791f", "skip": "#718096"}
_STYLE = (
    "text{font:11px ui-monospace,monospace;fill:#1a202c}"
    ".title{font-weight:bold}.quiet{fill:#718096}"
    "path{fill:none;stroke:#a0aec0;stroke-width:1.5}"
)


def write_svg(outline: Outline, path: Path) -> None:
    """Write the drawing through a temporary name.

    Raises:
        ConfigError: the name does not end in .svg.
    """
    if path.suffix != ".svg":
        raise ConfigError(f"--output {path}: only .svg is drawn; use a name such as graph.svg")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(graph_svg(outline), encoding="utf-8")
    temporary.replace(path)


def graph_svg(outline: Outline) -> str:
    """Return a row a block: its place in the graph, reuse by colour, share of MACs, what it saves,
    what it reads, its cache."""
    graph = outline.graph
    rows, rails = rows_of(graph), rails_of(graph, MOST_RAILS)
    names = LEFT + 12 + RAIL * (1 + max((rail.column for rail in rails), default=-1))
    bars = names + CHARACTER * (1 + max(len(row.name or _WHOLE) for row in rows))
    reads = bars + BAR + 280
    texts = [reads_text(graph, row.index) for row in rows]
    height = TOP + ROW * len(rows) + LEFT
    largest = max(row.share for row in rows)
    title = (
        f"{outline.id}: {graph.denoiser} at {outline.resolution} x {outline.resolution} pixels, "
        f"{graph.call_macs('all') / 1e9:.4g} GMACs a call"
    )
    width = LEFT + max(
        reads + CHARACTER * max(len("reads"), *map(len, texts)), CHARACTER * (2 + len(title))
    )
    parts = [
        f'<text class="title" x="{LEFT}" y="16">{escape(title)}</text>',
        *_heads(names, bars, reads),
        *(_rail_path(rail) for rail in rails),
        f'<path d="M{LEFT} {_y(1)}V{_y(len(rows))}"/>',
    ]
    for number, (row, text) in enumerate(zip(rows, texts, strict=True), start=1):
        parts += _row_parts(row, text, _y(number), (names, bars, reads), largest)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        f'width="{width:.0f}" height="{height}"><style>{_STYLE}</style>'
        '<rect width="100%" height="100%" fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


_WHOLE = "ungated parts"
_FIGURES = ("MACs", "paper", "saved", "cache MB")


def _heads(names: float, bars: float, reads: float) -> Iterable[str]:
    y = TOP - 8
    yield _text(names, y, "block", "quiet")
    for place, name in enumerate(_FIGURES):
        yield _text(bars + BAR + 60 * (place + 1), y, name, "quiet", end=True)
    yield _text(reads, y, "reads", "quiet")


def _row_parts(
    row: BlockRow, reads: str, y: float, places: tuple[float, float, float], largest: float
) -> Iterable[str]:
    names, bars, reads_at = places
    colour = _COLOURS[row.reuse]
    yield f'<circle cx="{LEFT}" cy="{y}" r="4" fill="{colour}"><title>{row.reuse}</title></circle>'
    yield _text(names, y + 4, row.name or _WHOLE)
    width = BAR * row.share / largest
    yield f'<rect x="{bars:.1f}" y="{y - 5}" width="{width:.1f}" height="10" fill="{colour}"/>'
    shares = (f"{100 * share:.1f}%" for share in (row.share, row.share_paper, row.saved))
    for place, figure in enumerate((*shares, megabytes(row.cache_bytes))):
        yield _text(bars + BAR + 60 * (place + 1), y + 4, figure, end=True)
    yield _text(reads_at, y + 4, reads, "quiet")


def _rail_path(rail: Rail) -> str:
    x = LEFT + RAIL * (rail.column + 1)
    stubs = "".join(f"M{x} {_y(row)}H{LEFT}" for row in rail.readers)
    return f'<path d="M{LEFT} {_y(rail.source)}H{x}V{_y(rail.end)}{stubs}"/>'


def _y(row: int) -> float:
    return TOP + ROW * (row - 0.5)


def _text(x: float, y: float, text: str, kind: str = "", *, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    shown = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{shown}{anchor}>{escape(text)}</text>'
