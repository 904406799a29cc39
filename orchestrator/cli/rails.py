"""Rails: edges of a block graph that pass over other blocks, each in a column of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dipgo_core.graph import INPUT, BlockGraph


@dataclass(frozen=True)
class Rail:
    """One block's output on its way past others. source, readers: rows; column: 0 is innermost."""

    source: int
    readers: tuple[int, ...]
    column: int

    @property
    def end(self) -> int:
        return self.readers[-1]


def rails_of(graph: BlockGraph, most: int) -> tuple[Rail, ...]:
    """Return the rails of all edges that do not lead to the next block.

    Empty where more than `most` would run side by side: then most blocks read most others, as where
    transformer layers add to one residual stream, and a drawing would show nothing.
    """
    spans = _spans(graph)
    width = max((_open_at(spans, row) for row in range(graph.num_blocks + 1)), default=0)
    if width > most:
        return ()
    rails: list[Rail] = []
    for source, readers in spans:
        taken = {rail.column for rail in rails if rail.end >= source}
        column = max(set(range(width)) - taken)  # what ends last was opened first: outermost
        rails.append(Rail(source, readers, column))
    return tuple(rails)


def _spans(graph: BlockGraph) -> list[tuple[int, tuple[int, ...]]]:
    """Return the rows of sources and of their later readers; the output is the row after all."""
    readers: dict[int, list[int]] = {}
    for row in range(1, graph.num_blocks + 1):
        for source in graph.producers[row % graph.num_blocks]:
            if source != INPUT and source != row - 1:
                readers.setdefault(source, []).append(row)
    return [(source, tuple(rows)) for source, rows in sorted(readers.items())]


def _open_at(spans: Sequence[tuple[int, tuple[int, ...]]], row: int) -> int:
    return sum(source <= row <= rows[-1] for source, rows in spans)


def rail_cells(rails: Sequence[Rail], row: int) -> str:
    """Return the box characters of one row, outwards from its block; two a column."""
    width = 1 + max((rail.column for rail in rails), default=-1)
    present = {rail.column: rail for rail in rails if rail.source <= row <= rail.end}
    reach = max((c for c, rail in present.items() if row in _rows(rail)), default=-1)
    return "".join(
        ("─" if column <= reach else " ") + _joint(present.get(column), row, column, reach)
        for column in range(width)
    )


def _rows(rail: Rail) -> tuple[int, ...]:
    return (rail.source, *rail.readers)


def _joint(rail: Rail | None, row: int, column: int, reach: int) -> str:
    onwards = column < reach
    if rail is None:
        return "─" if onwards else " "
    if row not in _rows(rail):
        return "│"
    if row == rail.source:
        return "┬" if onwards else "╮"
    if row == rail.end:
        return "┴" if onwards else "╯"
    return "┼" if onwards else "┤"
