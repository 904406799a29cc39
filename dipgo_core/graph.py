"""BlockGraph: the blocks of a denoiser, who reads whom, what is live, what it costs. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from dipgo_core.config import Convention
from dipgo_core.errors import SubNetError
from dipgo_core.gates import GateTable

#: Pseudo-producer: the value depends on the denoiser's inputs by a path that passes no block.
INPUT = -1


class Reuse(StrEnum):
    """What a block does when it is not computed."""

    SKIP = "skip"  # the denoiser: repeat the last prediction
    OUTPUT = "output"  # output = cached output; cuts the block's inputs
    RESIDUAL = "residual"  # output = input now + cached (out - in); inputs pass through


@dataclass(frozen=True)
class Block:
    """One gate: module name inside the denoiser, kind of reuse, own MACs of one batch-1 forward.

    streams: for residual blocks, the forward parameters that match the outputs one to one
    ("" where an output is None). elements: numbers in its outputs of one batch-1 forward.
    """

    name: str
    reuse: Reuse
    macs: int
    macs_paper: int
    streams: tuple[str, ...] = ()
    elements: int = 0

    def cost(self, convention: Convention) -> int:
        return self.macs if convention == "all" else self.macs_paper


@dataclass(frozen=True)
class Row:
    """What one call does with each block: plain tuples, so that a compiler sees constants.

    computes: run now. stores: run now, and a later call reads the output. reads: not run, the
    cached output is taken. frees: taken for the last time. A block that neither computes nor reads
    is dead: nobody looks at its output. joins: stored as one change with the block before it, since
    all later calls that reuse the one reuse the other. past: how many of the last predictions are
    held after the call for skipped calls that extrapolate.
    """

    computes: tuple[bool, ...]
    stores: tuple[bool, ...]
    reads: tuple[bool, ...]
    frees: tuple[bool, ...]
    joins: tuple[bool, ...]
    past: int = 0


@dataclass(frozen=True)
class Schedule:
    """The rows of a gate table by liveness.

    rows[c] is call c after the calls before it; whole[c] is call c where nothing usable is cached:
    the first executed call of a run, and one whose sample has another shape.
    """

    rows: tuple[Row, ...]
    whole: tuple[Row, ...]


@dataclass(frozen=True)
class BlockGraph:
    """Blocks in order of execution; blocks[0] is the denoiser itself (name "", reuse skip).

    producers[n] lists the blocks whose outputs block n reads (INPUT for an ungated path from the
    denoiser's inputs); producers[0] lists what the denoiser's output is computed from.
    blocks[0].macs counts the ungated parts, paid whenever the call is not skipped.
    """

    denoiser: str
    granularity: str
    blocks: tuple[Block, ...]
    producers: tuple[tuple[int, ...], ...]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    def live(self, row: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which blocks of one call are executed: kept and needed by the output.  # (N,)

        A row whose output would need neither a live block nor an input is a skip: all False.
        """
        (kept,) = bits_of(row[None])
        return row_of(self.priced(kept)[0], self.num_blocks)

    def priced(self, kept: int, convention: Convention = "all") -> tuple[int, int]:
        """Return what `live` does and its MACs, of rows as numbers: bit n is block n."""
        if not kept & 1:
            return 0, 0
        needed, residual = self._producer_bits[0], self._residual_bits
        live = macs = 0
        for bit, producers, cost in self._upstream[convention]:
            if needed & bit:
                if kept & bit:
                    live |= bit
                    macs += cost
                    needed |= producers
                elif residual & bit:
                    needed |= producers
        if not live and not needed >> self.num_blocks:
            return 0, 0
        return live | 1, macs + self.blocks[0].cost(convention)

    def reads(self, row: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Return which cached outputs one call takes: of blocks not run that it needs.  # (N,)

        A skipped call takes the prediction (column 0) alone.
        """
        live = self.live(row)
        if live[0]:
            (kept,) = bits_of(row[None])
            return np.logical_and(row_of(self._needed_bits(kept), self.num_blocks), ~live)
        return np.equal(np.arange(self.num_blocks), 0)

    def _needed_bits(self, kept: int) -> int:
        """Return what the output is computed from; the bit after the last block is the inputs."""
        needed = self._producer_bits[0]
        passing = kept | self._residual_bits
        for bit, producers, _ in self._upstream["all"]:
            if needed & passing & bit:
                needed |= producers
        return needed

    @cached_property
    def _producer_bits(self) -> tuple[int, ...]:
        """What each block reads, as a number; the inputs come after the last block."""
        return tuple(
            sum(1 << (self.num_blocks if n == INPUT else n) for n in set(producers))
            for producers in self.producers
        )

    @cached_property
    def _residual_bits(self) -> int:
        return sum(1 << n for n, block in enumerate(self.blocks) if block.reuse is Reuse.RESIDUAL)

    @cached_property
    def _upstream(self) -> dict[Convention, tuple[tuple[int, int, int], ...]]:
        """Each block's bit, what it reads and its MACs, the last one executed first: who reads a
        block was executed after it."""
        numbers = range(self.num_blocks - 1, 0, -1)
        both: tuple[Convention, Convention] = ("all", "paper")
        return {
            name: tuple(
                (1 << n, self._producer_bits[n], self.blocks[n].cost(name)) for n in numbers
            )
            for name in both
        }

    def schedule(self, gates: GateTable) -> Schedule:
        """Return what each call computes, keeps for later, takes from the cache, and lets go."""
        self.check(gates)
        everything = np.ones(self.num_blocks, dtype=np.bool_)
        nothing = ~everything
        # for each output, the calls that read it before it is computed again
        readers: list[tuple[int, ...]] = [()] * self.num_blocks
        rows, whole = list[Row](), list[Row]()
        pasts = self._pasts(gates)
        for call, keep in reversed(list(enumerate(gates.keep))):
            live, reads = self.live(keep), self.reads(keep)
            later = np.array([bool(calls) for calls in readers])
            stores, joins = live & later, self._joins(readers)
            past = pasts[call]
            rows.append(
                _row(live, stores, reads, reads & ~later, joins & _paired(stores), past=past)
            )
            whole.append(
                _row(everything, later, nothing, nothing, joins & _paired(later), past=past)
            )
            readers = [
                (call, *calls) if reads[n] else () if live[n] else calls
                for n, calls in enumerate(readers)
            ]
        return Schedule(tuple(rows[::-1]), tuple(whole[::-1]))

    def _pasts(self, gates: GateTable) -> list[int]:
        """Return how many predictions each call leaves behind for skipped calls to extrapolate.

        A skipped call reads the last two that were computed before it.
        """
        if not gates.extrapolation:
            return [0] * gates.num_calls
        skipped = [not self.live(row)[0] for row in gates.keep]
        pasts, wanted = list[int](), 0
        for call in reversed(range(gates.num_calls)):
            pasts.append(wanted)
            wanted = 2 if skipped[call] else max(0, wanted - 1)
        return pasts[::-1]

    def _joins(self, readers: Sequence[tuple[int, ...]]) -> npt.NDArray[np.bool_]:
        """Return which blocks go on a residual stream together with the block before them."""
        return np.array(
            [n in self._continued and readers[n] == readers[n - 1] for n in range(self.num_blocks)]
        )

    @cached_property
    def _continued(self) -> frozenset[int]:
        """Blocks that alone read the block before them, both of residual reuse."""
        consumers = [n for producers in self.producers for n in producers]
        return frozenset(
            n
            for n in range(2, self.num_blocks)
            if self.blocks[n].reuse is self.blocks[n - 1].reuse is Reuse.RESIDUAL
            and n - 1 in self.producers[n]
            and consumers.count(n - 1) == 1
        )

    def peak_cache(self, gates: GateTable, sizes: Sequence[int]) -> int:
        """Return the most bytes that are cached at once in a run of all calls.

        sizes: bytes that each block's output takes, [0] those of the prediction.
        """
        held, peak, cached = 0, 0, dict[int, int]()
        schedule = self.schedule(gates)
        predictions = 0  # of those that skipped calls extrapolate
        last = () if gates.extrapolation else (0,)
        for row in (schedule.whole[0], *schedule.rows[1:]):
            first = 0
            for n in (*range(1, self.num_blocks), *last):  # the prediction comes last
                first = first if row.joins[n] else n
                if row.stores[n] and not (*row.joins, False)[n + 1]:
                    cached[first] = sizes[n]
                    held += sizes[n]
                if row.frees[n]:
                    held -= cached.pop(n, 0)
                peak = max(peak, held)
            before, predictions = predictions, min(predictions + row.computes[0], row.past)
            held += sizes[0] * (predictions - before)
            peak = max(peak, held)
        return peak

    def close(self, gates: GateTable) -> GateTable:
        """Return the canonical table: dead blocks reuse, calls that compute nothing skip."""
        self.check(gates)
        rows = (self.priced(kept)[0] for kept in bits_of(gates.keep))
        keep = np.stack([row_of(live, self.num_blocks) for live in rows])
        return GateTable(keep, gates.extrapolation)

    def check(self, gates: GateTable) -> None:
        """Raise SubNetError unless the table has one column a block."""
        if gates.num_blocks != self.num_blocks:
            raise SubNetError(
                f"the table has {gates.num_blocks} gates a call, {self.denoiser} has "
                f"{self.num_blocks} at granularity {self.granularity!r} (the first is the denoiser "
                "itself)"
            )

    def costs(self, convention: Convention = "all") -> npt.NDArray[np.int64]:
        """MACs of each block's own work; column 0 is the ungated parts.  # (N,)"""
        return np.array([block.cost(convention) for block in self.blocks], dtype=np.int64)

    def row_macs(self, row: npt.NDArray[np.bool_], convention: Convention = "all") -> int:
        (kept,) = bits_of(row[None])
        return self.priced(kept, convention)[1]

    def call_macs(self, convention: Convention = "all") -> int:
        """MACs of one dense call, batch 1."""
        return sum(block.cost(convention) for block in self.blocks)

    def macs(
        self, gates: GateTable, convention: Convention = "all", guided: int | None = None
    ) -> int:
        """MACs of all calls, batch 1, closure included.

        guided: how many calls have guidance, the first ones (None: all); the others run half of the
        batch, and count half.
        """
        self.check(gates)
        calls = [self.priced(kept, convention)[1] for kept in bits_of(gates.keep)]
        return (sum(calls) + sum(calls[:guided])) // 2

    def pruned_ratio(self, gates: GateTable, convention: Convention = "all") -> float:
        return 1 - self.macs(gates, convention) / (gates.num_calls * self.call_macs(convention))

    def savings(self, convention: Convention = "all") -> npt.NDArray[np.float64]:
        """gamma: share of a dense call saved by reusing one block, closure included.  # (N,)"""
        kept = (self.row_macs(self._all_but(n), convention) for n in range(self.num_blocks))
        return np.array([1 - macs / self.call_macs(convention) for macs in kept])

    @cached_property
    def searched(self) -> tuple[int, ...]:
        """Gates a search decides: all but a skip gate that a block's reuse implies (U-Nets)."""
        return tuple(range(1 if self.skip_gate else 0, self.num_blocks))

    @cached_property
    def skip_gate(self) -> int:
        """The gate whose reuse skips the call: that of the block it follows from, else 0, its own.

        A U-Net's output is its last block's: to reuse that is to repeat the prediction.
        """
        implying = (n for n in self.producers[0] if n > 0 and not self.live(self._all_but(n))[0])
        return next(implying, 0)

    def _all_but(self, n: int) -> npt.NDArray[np.bool_]:
        """Return the row that keeps every block but one.  # (N,)"""
        return np.not_equal(np.arange(self.num_blocks), n)

    def to_json(self) -> dict[str, Any]:
        return {
            "denoiser": self.denoiser,
            "granularity": self.granularity,
            "blocks": [
                {**asdict(b), "reuse": str(b.reuse), "streams": list(b.streams)}
                for b in self.blocks
            ],
            "producers": [list(p) for p in self.producers],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> BlockGraph:
        return cls(
            denoiser=data["denoiser"],
            granularity=data["granularity"],
            blocks=tuple(
                Block(**{**b, "reuse": Reuse(b["reuse"]), "streams": tuple(b["streams"])})
                for b in data["blocks"]
            ),
            producers=tuple(tuple(p) for p in data["producers"]),
        )


def bits_of(keep: npt.NDArray[np.bool_]) -> list[int]:
    """Return rows as numbers whose bit n is column n.  # (T, N)"""
    packed = np.packbits(keep, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in packed]


def row_of(bits: int, width: int) -> npt.NDArray[np.bool_]:
    """Return the first columns of a row from its number.  # (width,)"""
    data = np.frombuffer(bits.to_bytes(width // 8 + 1, "little"), dtype=np.uint8)
    return np.unpackbits(data, count=width, bitorder="little").astype(np.bool_)


def _paired(flags: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which entries are set together with the one before them."""
    before = np.zeros_like(flags)
    before[1:] = flags[:-1]
    return np.logical_and(flags, before)


def _row(*columns: npt.NDArray[np.bool_], past: int) -> Row:
    computes, stores, reads, frees, joins = (tuple(column.tolist()) for column in columns)
    return Row(computes, stores, reads, frees, joins, past)
