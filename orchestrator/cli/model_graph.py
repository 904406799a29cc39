"""`models show`: a block graph in the terminal, a row a block, skip connections as rails."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dipgo_core.graph import INPUT, BlockGraph
from orchestrator.cli.rails import rail_cells, rails_of
from orchestrator.cli.show import console, megabytes, say

if TYPE_CHECKING:
    from dipgo_core.outline import Outline

GIGA = 1e9
BYTES = 2  # a number in 16 bit
MOST_RAILS = 14
LONG_READS = 4
_BAR = 12
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class BlockRow:
    """What is shown of one block. shares and saved: of a dense call; cache: bytes in 16 bit."""

    index: int
    name: str
    reuse: str
    streams: tuple[str, ...]
    reads: tuple[int, ...]
    macs: int
    macs_paper: int
    share: float
    share_paper: float
    saved: float
    saved_paper: float
    cache_bytes: int


def rows_of(graph: BlockGraph) -> tuple[BlockRow, ...]:
    """Return a row a block in order of execution, the denoiser itself last."""
    saved, saved_paper = graph.savings("all"), graph.savings("paper")
    whole, whole_paper = graph.call_macs("all"), graph.call_macs("paper")
    return tuple(
        BlockRow(
            index=n,
            name=block.name,
            reuse=str(block.reuse),
            streams=block.streams,
            reads=graph.producers[n],
            macs=block.macs,
            macs_paper=block.macs_paper,
            share=block.macs / whole,
            share_paper=block.macs_paper / whole_paper,
            saved=float(saved[n]),
            saved_paper=float(saved_paper[n]),
            cache_bytes=BYTES * block.elements,
        )
        for n, block in (*list(enumerate(graph.blocks))[1:], (0, graph.blocks[0]))
    )


def graph_json(outline: Outline) -> dict[str, Any]:
    """Return the graph with what is derived from it; reads: -1 is the denoiser's inputs."""
    graph = outline.graph
    return {
        "id": outline.id,
        "family": outline.family.name,
        "denoiser": graph.denoiser,
        "granularity": graph.granularity,
        "resolution": outline.resolution,
        "macs": {"all": graph.call_macs("all"), "paper": graph.call_macs("paper")},
        "cache_bytes": BYTES * sum(block.elements for block in graph.blocks),
        "searched": list(graph.searched),
        "blocks": [_row_json(row) for row in sorted(rows_of(graph), key=lambda row: row.index)],
    }


def _row_json(row: BlockRow) -> dict[str, Any]:
    return {
        "index": row.index,
        "name": row.name,
        "reuse": row.reuse,
        "streams": list(row.streams),
        "reads": list(row.reads),
        "macs": {"all": row.macs, "paper": row.macs_paper},
        "share": {"all": row.share, "paper": row.share_paper},
        "gamma": {"all": row.saved, "paper": row.saved_paper},
        "cache_bytes": row.cache_bytes,
    }


# the terminal -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Which columns are shown beside number, name, shares and cache."""

    rails: bool
    reads: bool
    bar: bool


#: From the widest to the narrowest.
_LAYOUTS = (
    _Layout(rails=True, reads=True, bar=True),
    _Layout(rails=True, reads=True, bar=False),
    _Layout(rails=True, reads=False, bar=False),
    _Layout(rails=False, reads=True, bar=False),
    _Layout(rails=False, reads=False, bar=False),
)


def print_graph(outline: Outline) -> None:
    """Print a graph as wide as the terminal allows, and what its columns mean."""
    target = console()
    target.print(Text(_title(outline), style="bold"))
    for line in _kinds(outline.graph):
        target.print(Text(line))
    target.print(_fitting(outline.graph, target))
    say("MACs, paper: share of a dense call, with and without attention products")
    say("saved: share of its MACs (with them) that reusing the block alone saves, unread ones too")
    say("cache MB: output of one batch-1 forward in 16 bit; guidance doubles it")


def _title(outline: Outline) -> str:
    graph = outline.graph
    total = BYTES * sum(block.elements for block in graph.blocks)
    return (
        f"{outline.id}: {graph.denoiser} at {outline.resolution} x {outline.resolution} pixels, "
        f"{graph.num_blocks} gates a call, {graph.call_macs('all') / GIGA:.4g} GMACs "
        f"({graph.call_macs('paper') / GIGA:.4g} without attention products), "
        f"cache {megabytes(total)} MB"
    )


def _kinds(graph: BlockGraph) -> Iterable[str]:
    """Say once what all blocks have in common, or which kinds there are."""
    kinds = list(dict.fromkeys((block.reuse, block.streams) for block in graph.blocks[1:]))
    for reuse, streams in kinds:
        count = sum((b.reuse, b.streams) == (reuse, streams) for b in graph.blocks[1:])
        passed = ", ".join(stream or "none" for stream in streams)
        yield f"{count} blocks reused by {reuse}" + (f" of {passed}" if passed else "")
    if _all_read_inputs(graph):
        yield "every block reads the denoiser's inputs as well"


def _all_read_inputs(graph: BlockGraph) -> bool:
    return all(INPUT in producers for producers in graph.producers[1:])


def _fitting(graph: BlockGraph, target: Console) -> Table:
    """Return the widest table that fits, else the narrowest."""
    drawn = bool(rails_of(graph, MOST_RAILS))
    tables = [_table(graph, layout) for layout in _LAYOUTS if drawn or not layout.rails]
    if not drawn:
        tables.insert(0, _table(graph, _Layout(rails=False, reads=True, bar=True)))
    return next((each for each in tables if _width(each, target) <= target.width), tables[-1])


def _width(table: Table, target: Console) -> int:
    """Return how wide a table is that nothing holds back."""
    unbound = target.options.update(max_width=10_000)
    return int(table.__rich_measure__(target, unbound).maximum)


def _table(graph: BlockGraph, layout: _Layout) -> Table:
    rows, rails = rows_of(graph), rails_of(graph, MOST_RAILS)
    mixed = len({block.reuse for block in graph.blocks[1:]}) > 1
    largest = max(row.share for row in rows)
    columns: list[tuple[str, str, list[str]]] = [
        ("", "right", [f"{row.index}" for row in rows]),
    ]
    if layout.rails:
        cells = [rail_cells(rails, number) for number in range(1, graph.num_blocks + 1)]
        columns.append(("", "left", [f"●{cell}" for cell in cells]))
    columns.append(("block", "left", [row.name or "ungated parts" for row in rows]))
    if mixed:
        columns.append(("reuse", "left", [row.reuse for row in rows]))
    if layout.reads:
        columns.append(("reads", "left", [reads_text(graph, row.index) for row in rows]))
    if layout.bar:
        columns.append(("", "left", [_bar(row.share / largest) for row in rows]))
    columns += [
        ("MACs", "right", [_percent(row.share) for row in rows]),
        ("paper", "right", [_percent(row.share_paper) for row in rows]),
        ("saved", "right", [_percent(row.saved) for row in rows]),
        ("cache MB", "right", [megabytes(row.cache_bytes) for row in rows]),
    ]
    return _as_table(columns)


def _as_table(columns: Sequence[tuple[str, Any, list[str]]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side, _ in columns:
        table.add_column(name, justify=side, no_wrap=name != "block", overflow="fold")
    for cells in zip(*(values for _, _, values in columns), strict=True):
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _bar(share: float) -> str:
    whole, eighths = divmod(round(share * _BAR * 8), 8)
    return "█" * whole + _EIGHTHS[eighths].strip()


def reads_text(graph: BlockGraph, n: int) -> str:
    """Return which blocks' outputs a block reads; many are told by kind, such as ``attn, ff``."""
    reads = tuple(p for p in graph.producers[n] if p != INPUT)
    earlier = range(1, n or graph.num_blocks)
    inputs = INPUT in graph.producers[n] and not (_all_read_inputs(graph) and n)
    if len(reads) > LONG_READS and len(reads) == len(earlier):
        texts = ["all before"]
    elif len(reads) > LONG_READS and (kinds := _kinds_read(graph, n, reads)) is not None:
        texts = [kinds]
    else:
        texts = [_ranges(reads)] if reads else []
    return ", ".join([*(["inputs"] if inputs else []), *texts])


def _kinds_read(graph: BlockGraph, n: int, reads: Sequence[int]) -> str | None:
    """Return "all KIND, KIND; N" if a block reads all blocks of some kinds in earlier modules and
    single ones of its own module; None if it is not that regular."""
    own = {p for p in range(1, n) if _module(graph, p) == _module(graph, n)}
    kinds = list(dict.fromkeys(_kind(graph, p) for p in reads if p not in own))
    last = n or graph.num_blocks
    whole = {p for p in range(1, last) if _kind(graph, p) in kinds} - own
    if whole != set(reads) - own:
        return None
    siblings = [f"{p}" for p in reads if p in own]
    return "; ".join([f"all {', '.join(kinds)}", *([", ".join(siblings)] if siblings else [])])


def _module(graph: BlockGraph, n: int) -> str:
    return graph.names[n].rpartition(".")[0]


def _kind(graph: BlockGraph, n: int) -> str:
    return re.sub(r"(\.\d+)$", "", graph.names[n]).rpartition(".")[2]


def _ranges(numbers: Sequence[int]) -> str:
    """Return "1-3, 5" for 1, 2, 3, 5."""
    breaks = [i + 1 for i, (a, b) in enumerate(pairwise(numbers)) if b != a + 1]
    parts = [numbers[a:b] for a, b in pairwise([0, *breaks, len(numbers)])]
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else f"{p[0]}" for p in parts)
