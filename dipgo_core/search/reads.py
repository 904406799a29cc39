"""What a gate table reuses: which block, at which call, how old. Pure, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dipgo_core.config import Convention
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph, bits_of, row_of

Rows = tuple[int, ...]


@dataclass(frozen=True)
class _Row:
    """One call: blocks computed and read as lists, MACs, and its canonical form."""

    live: tuple[int, ...]
    reads: tuple[int, ...]
    macs: int
    closed: int


@dataclass(eq=False)
class TableSpace:
    """Gate tables as rows of numbers (bit n is block n), their reuses and their MACs.

    staleness: older reuses count as of this age. A reuse is numbered
    (call * num_blocks + block) * staleness + age - 1.
    """

    graph: BlockGraph
    num_calls: int
    staleness: int
    convention: Convention = "all"
    _rows: dict[int, _Row] = field(default_factory=dict)

    @property
    def num_reuses(self) -> int:
        return self.num_calls * self.graph.num_blocks * self.staleness

    def rows_of(self, gates: GateTable) -> Rows:
        return tuple(bits_of(gates.keep))

    def table_of(self, rows: Rows, extrapolation: float = 0.0) -> GateTable:
        width = self.graph.num_blocks
        return GateTable(np.stack([row_of(row, width) for row in rows]), extrapolation)

    def close(self, rows: Rows) -> Rows:
        """Return the canonical rows: dead blocks reuse, calls that compute nothing skip."""
        return tuple(self._row(row).closed for row in rows)

    def macs(self, rows: Rows) -> int:
        """Return the MACs of all calls, batch 1, closure included."""
        return sum(self._row(row).macs for row in rows)

    def reuses(self, rows: Rows) -> npt.NDArray[np.int64]:
        """Return the numbers of all reuses of a table; its first call computes everything."""
        last = [0] * self.graph.num_blocks
        blocks, ages = self.graph.num_blocks, self.staleness
        found = []
        for call, bits in enumerate(rows):
            row = self._row(bits)
            if call:
                start = call * blocks
                found += [(start + n) * ages + min(call - last[n], ages) - 1 for n in row.reads]
            for n in row.live:
                last[n] = call
        return np.array(found, dtype=np.int64)

    def _row(self, bits: int) -> _Row:
        known = self._rows.get(bits)
        if known is None:
            width = self.graph.num_blocks
            keep = row_of(bits, width)
            closed, macs = self.graph.priced(bits, self.convention)
            live = tuple(np.flatnonzero(row_of(closed, width)).tolist())
            reads = tuple(np.flatnonzero(self.graph.reads(keep)).tolist())
            known = self._rows[bits] = _Row(live, reads, macs, closed)
        return known
