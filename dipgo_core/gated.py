"""GatedCalls: the policy that follows a gate table, with caches that live as long as they are read.

Everything a run remembers is in one object, so that runs of several threads share nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

from torch import Tensor

from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph, Reuse, Row
from dipgo_core.repeat import Repeat
from dipgo_core.structures import Structure, Tensors

#: Shape, dtype and device.
Signature = tuple[Any, ...]


@dataclass(frozen=True)
class GatePlan:
    """A gate table made ready to run: its rows by liveness, and what each block's reuse means.

    has_dead: some call has blocks that only look as if they had run. seldom_mixed: in most calls
    that are not skipped, no block has anything to do but run. extrapolation: see `GateTable`.
    """

    names: tuple[str, ...]
    residual: tuple[bool, ...]
    rows: tuple[Row, ...]
    whole: tuple[Row, ...]
    has_dead: bool
    seldom_mixed: bool
    extrapolation: float

    @classmethod
    def of(cls, graph: BlockGraph, gates: GateTable) -> GatePlan:
        schedule = graph.schedule(gates)
        residual = tuple(block.reuse is Reuse.RESIDUAL for block in graph.blocks)
        dead = (
            not (residual[n] or row.computes[n] or row.reads[n])
            for row in schedule.rows
            for n in range(1, graph.num_blocks)
            if row.computes[0]
        )
        computed = [row for row in schedule.rows if row.computes[0]]
        plain = sum(map(_is_plain, computed))
        whole = 2 * plain > len(computed)
        return cls(
            graph.names,
            residual,
            schedule.rows,
            schedule.whole,
            any(dead),
            whole,
            gates.extrapolation,
        )


@dataclass
class _Place:
    """What one forward of the step remembers from call to call, for samples of one signature."""

    signature: Signature
    call: int = -1
    cached: dict[int, Tensors] = field(default_factory=dict)
    outlines: dict[int, Tensors] = field(default_factory=dict)  # of outputs nobody will look at
    made: dict[int, tuple[Any, ...]] = field(default_factory=dict)  # weak references to outputs
    containers: dict[str, tuple[Tensors, Structure]] = field(default_factory=dict)
    past: list[tuple[int, Tensors]] = field(default_factory=list)  # call, what can be repeated


@dataclass
class _Chain:
    """Blocks computed one after the other on a residual stream, to be cached as one change."""

    first: int
    start: Tensors
    outputs: Tensors


class GatedCalls:
    """Policy that follows a gate table: computes live blocks, reuses caches for all others.

    A pipeline that evaluates the denoiser several times a call has one place for each of them. A
    place is computed whole the first time, after a call it was left out of, and whenever its
    sample has another shape, dtype or device than before.

    leaves_blocks_alone: whether `block` has nothing to do in the present forward. learns_dead:
    whether it shows what blocks look like that will be dead in later calls.

    first_call: gives the row a run starts with from the timestep its denoiser gets. roomy: dead
    blocks return memory that may be written to, not one element seen at every index.
    """

    def __init__(
        self,
        plan: GatePlan,
        repeat: Callable[[], Repeat],
        *,
        first_call: Callable[[Any], int] = lambda timestep: 0,
        roomy: bool = False,
    ) -> None:
        self._plan = plan
        self._repeat = repeat
        self._first_call = first_call
        self._roomy = roomy
        self._held = 0
        self.peak_cache_bytes = 0
        self.leaves_blocks_alone = False
        self.learns_dead = False
        self.restart()

    def restart(self, plan: GatePlan | None = None) -> None:
        """Forget everything; the run's first row is found when its denoiser is called.

        plan: to follow from now on, if another.
        """
        self._plan = self._plan if plan is None else plan
        self._places: list[_Place] = []
        self._held = 0
        self._call: int | None = None
        self._index = 0
        self._spared = False

    def start_call(self, call: int) -> None:
        """Go to row `call` of the table; call 0 begins a run."""
        if call == 0:
            self.restart()
        for place in self._places:
            if place.call != call - 1:  # left out of the call before
                self._drop(place)
        self._call, self._index, self._spared = call, 0, False

    def advance(self) -> None:
        """Go to the next row; before the first call of a run this does nothing."""
        if self._call is not None:
            self.start_call(self._call + 1)

    def spares(self) -> bool:
        """Return whether the forward to come skips the denoiser, so that what feeds it may too.

        Holds as long as the denoiser's sample is like the last one.
        """
        call, place = self._call, self._index
        spared = (
            call is not None
            and 0 < call < len(self._plan.rows)
            and place < len(self._places)
            and self._places[place].call == call - 1
            and not self._plan.rows[call].computes[0]
        )
        self._spared = self._spared or spared
        return spared

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        if self._call is None:
            self._call = self._first_call(timestep)
        row = self._enter(self._call, sample)
        if not row.computes[0]:
            again = self._repeat().at(sample, timestep)
            if self._plan.extrapolation:
                return again.predictions(self._extrapolated())
            cached = self._take(0)
            repeated = again.predictions(cached)
            return repeated if repeated is not cached or row.frees[0] else _cloned(repeated)
        prediction = compute()
        self._end_chain()  # where the pipeline left out its last blocks
        if self._plan.extrapolation:
            self._remember(self._repeat().at(sample, timestep).repeatable(prediction), prediction)
        elif row.stores[0]:
            repeatable = self._repeat().at(sample, timestep).repeatable(prediction)
            self._put(0, _cloned(repeatable) if repeatable is prediction else repeatable)
        return prediction

    def _remember(self, repeatable: Tensors, prediction: Tensors) -> None:
        """Hold a prediction for calls that extrapolate, as long as any will."""
        place, row = self._place, self._row
        assert self._call is not None
        if row.past:
            kept = _cloned(repeatable) if repeatable is prediction else repeatable
            place.past.append((self._call, kept))
            self._held += _bytes(kept)
        self._forget()
        self.peak_cache_bytes = max(self.peak_cache_bytes, self._held)

    def _extrapolated(self) -> Tensors:
        """Return what a skipped call predicts from the last two predictions that were computed.

        Where there is only one, or it has another shape, that one is repeated.
        """
        past, share = self._place.past, self._plan.extrapolation
        assert self._call is not None and past
        last, now = past[-1]
        made = _cloned(now)
        if len(past) > 1:
            before, old = past[-2]
            carried = share * (self._call - last) / (last - before)
            made = tuple(
                None if a is None or b is None else a + carried * (a - b)
                for a, b in zip(now, old, strict=True)
            )
        self._forget()
        return made

    def _forget(self) -> None:
        """Let go of predictions that no later call will extrapolate."""
        past, wanted = self._place.past, self._row.past
        while len(past) > wanted:
            self._held -= _bytes(past.pop(0)[1])

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        row, residual = self._row, self._plan.residual[index]
        if row.computes[index]:
            outputs = compute()
            if not residual and self._is_whole:
                self._place.outlines[index] = outlined(outputs)
                self._place.made[index] = tuple([ref(t) for t in outputs if t is not None])
            if row.stores[index] and residual:
                self._put_change(index, streams, outputs)
            elif row.stores[index]:
                self._put(index, _cloned(outputs))
            return outputs
        if row.reads[index]:
            cached = self._take(index)
            if residual:
                return _added(streams, cached) if cached else streams
            return cached if row.frees[index] else _cloned(cached)
        return streams if residual else self._dead(index)

    def learn_container(
        self, name: str, members: tuple[int, ...], tensors: Tensors, structure: Structure
    ) -> None:
        """Remember what a container of blocks returns, if that is nothing but their outputs."""
        made = [r() for index in members for r in self._place.made.get(index, ())]
        if all(t is None or any(t is one for one in made) for t in tensors):
            self._place.containers[name] = (outlined(tensors), structure)

    def dead_container(
        self, name: str, members: tuple[int, ...]
    ) -> tuple[Tensors, Structure] | None:
        """Return what a container looks like where all its blocks are dead, else None."""
        row = self._row
        if self._roomy or any(row.computes[n] or row.reads[n] for n in members):
            return None
        return self._place.containers.get(name)

    def _enter(self, call: int, sample: Tensor) -> Row:
        """Go to this forward's place; return its row."""
        if call >= len(self._plan.rows):
            raise SubNetMismatchError(
                f"the SubNet has {len(self._plan.rows)} calls, but the denoiser is called once more"
            )
        signature = signature_of(sample)
        if self._index == len(self._places):
            self._places.append(_Place(signature))
        place = self._places[self._index]
        self._is_whole = place.signature != signature or place.call != call - 1 or call == 0
        if self._is_whole:
            self._check_fed()
            self._drop(place)
            place = self._places[self._index] = _Place(signature)
        place.call = call
        self._place = place
        self._index += 1
        self._chain: _Chain | None = None
        self._row = row = self._plan.whole[call] if self._is_whole else self._plan.rows[call]
        self.learns_dead = self._is_whole and self._plan.has_dead
        self.leaves_blocks_alone = _is_plain(row) and not self.learns_dead
        return row

    def _check_fed(self) -> None:
        if self._spared:
            raise SubNetError(
                "the denoiser's sample changed its shape in a call that was to be skipped, after "
                "the ControlNet had been left out; keep guidance as it is, or guess_mode off"
            )

    def _put_change(self, index: int, streams: Tensors, outputs: Tensors) -> None:
        """Cache what blocks add to the stream: one change for all that are reused together.

        The first of them then makes the change, the others pass their streams on. Where something
        else changed the stream between two blocks (a ControlNet), they are cached apart.
        """
        joins, chain = self._row.joins, self._chain
        if joins[index] and chain is not None and _same(streams, chain.outputs):
            chain.outputs = outputs
            self._put(index, ())
        else:
            self._end_chain()
            self._chain = _Chain(index, streams, outputs)
        if index + 1 == len(joins) or not joins[index + 1]:
            self._end_chain()

    def _end_chain(self) -> None:
        if (chain := self._chain) is not None:
            self._chain = None
            self._put(chain.first, _subtracted(chain.outputs, chain.start))

    def _put(self, index: int, tensors: Tensors) -> None:
        self._place.cached[index] = tensors
        self._held += _bytes(tensors)
        self.peak_cache_bytes = max(self.peak_cache_bytes, self._held)

    def _take(self, index: int) -> Tensors:
        """Return what is cached; the row says whether it is let go."""
        cached = self._place.cached
        if index not in cached:
            raise SubNetError(
                f"block {self._plan.names[index] or 'denoiser'!r} is to be reused, but this "
                "pipeline did not run it in the call that is cached; leave it out of the SubNet"
            )
        if not self._row.frees[index]:
            return cached[index]
        self._held -= _bytes(cached[index])
        return cached.pop(index)

    def _drop(self, place: _Place) -> None:
        """Let go of what a place has cached; its next forward will be whole."""
        self._held -= sum(map(_bytes, place.cached.values()))
        self._held -= sum(_bytes(tensors) for _, tensors in place.past)
        place.cached.clear()
        place.past.clear()
        place.call = -1

    def _dead(self, index: int) -> Tensors:
        outline = self._place.outlines.get(index, ())
        if not self._roomy:
            return outline
        return tuple(None if t is None else t.new_empty(t.shape) for t in outline)


def _is_plain(row: Row) -> bool:
    return all(row.computes) and not any(row.stores[1:])


def _same(tensors: Tensors, others: Tensors) -> bool:
    return all(a is b for a, b in zip(tensors, others, strict=True))


def signature_of(sample: Tensor) -> Signature:
    """Return what must be as before for a cache to fit."""
    return sample.shape, sample.dtype, sample.device


def _cloned(tensors: Tensors) -> Tensors:
    """Copies, because some modules (FreeU, adapters) change what they are given in place.

    A tensor that is there twice is copied once: a U-Net's block also hands on its last state.
    """
    copies = {id(t): t.clone() for t in tensors if t is not None}
    return tuple([None if t is None else copies[id(t)] for t in tensors])


def outlined(tensors: Tensors) -> Tensors:
    """Tensors of the same shapes that take one element of memory each."""
    return tuple([None if t is None else t.new_empty(()).expand(t.shape) for t in tensors])


def _bytes(tensors: Tensors) -> int:
    distinct = {id(t): t for t in tensors if t is not None}
    return sum(t.numel() * t.element_size() for t in distinct.values())


def _subtracted(outputs: Tensors, streams: Tensors) -> Tensors:
    return tuple(
        [
            None if out is None or stream is None else out - stream
            for out, stream in zip(outputs, streams, strict=True)
        ]
    )


def _added(streams: Tensors, changes: Tensors) -> Tensors:
    return tuple(
        [
            None if change is None or stream is None else stream + change
            for stream, change in zip(streams, changes, strict=True)
        ]
    )
