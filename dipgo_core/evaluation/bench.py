"""Bench: what a SubNet gains on this machine, dense and pruned calls measured side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from dipgo_core.binding import scheduler_of
from dipgo_core.config import Convention, SamplerSettings
from dipgo_core.evaluation.side_by_side import Effort, PreparedRun, measure_side_by_side
from dipgo_core.evaluation.stopwatch import Run
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.runtime import SubNetHandle, apply_subnet
from dipgo_core.sampling import call_arguments
from dipgo_core.subnet import SubNet

#: What is generated where nobody says; times do not depend on it.
DEFAULT_ITEM = Item("a photograph of an astronaut riding a horse", label=0)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured.

    record: times, speed-ups, images a second, memory, energy, device and versions, as in a latency
    record. macs_speedup: dense / kept MACs of a run at this size. peak_cache_bytes: the most that a
    run of the SubNet keeps at once. fused: whether runs of skipped calls were one step where that
    is equal.
    """

    record: Mapping[str, Any]
    macs_speedup: Mapping[str, float]
    peak_cache_bytes: int
    fused: bool

    def to_json(self) -> dict[str, Any]:
        return {
            **self.record,
            "macs_speedup": dict(self.macs_speedup),
            "peak_cache_bytes": self.peak_cache_bytes,
            "fused": self.fused,
        }


def bench(
    model: LoadedModel,
    subnet: SubNet,
    *,
    effort: Effort | None = None,
    item: Item = DEFAULT_ITEM,
    compile: Mapping[str, Any] | None = None,
    fuse: bool = False,
) -> Bench:
    """Measure the pipeline with and without the SubNet, by the SubNet's own sampler.

    item: what all images of a batch show. compile: options of torch.compile; the dense side's
    blocks are then compiled in the same way. fuse: jump over skipped calls, as
    `SubNetHandle.fuse` does.

    Raises:
        SubNetMismatchError: the SubNet was made for another model or noise scheduler; the message
            says what works.
    """
    effort = effort or Effort()
    items = (item,) * effort.batch_size
    pair = _Pair(model, subnet, items, compile=compile, fuse=fuse)
    record = measure_side_by_side(model, PreparedRun(pair.dense), PreparedRun(pair.pruned), effort)
    return Bench(
        record={**record, "compile": "none" if compile is None else "torch.compile, by block"},
        macs_speedup=macs_speedups(model, subnet),
        peak_cache_bytes=pair.peak_cache_bytes(),
        fused=fuse,
    )


def macs_speedups(model: LoadedModel, subnet: SubNet) -> dict[str, float]:
    """Return dense / kept MACs of a run by convention, at the size of this model's images.

    The SubNet's own MACs may be those of another size.
    """
    graph, gates = block_graph(model, subnet.granularity), subnet.gates
    conventions: tuple[Convention, ...] = ("all", "paper")
    return {
        name: graph.call_macs(name) * gates.num_calls / graph.macs(gates, name)
        for name in conventions
    }


class _Pair:
    """The two ways to call one pipeline: dense, and with the SubNet applied."""

    def __init__(
        self,
        model: LoadedModel,
        subnet: SubNet,
        items: Sequence[Item],
        *,
        compile: Mapping[str, Any] | None,
        fuse: bool,
    ) -> None:
        self._model, self._subnet, self._items = model, subnet, items
        self._options, self._fuse = compile, fuse
        model.pipe.scheduler = scheduler_of(subnet)
        apply_subnet(model.pipe, subnet).remove()  # refuses what does not fit before any run

    @contextmanager
    def dense(self) -> Iterator[Run]:
        """Call the plain pipeline, or the one whose blocks are compiled and all computed."""
        arguments = self._arguments()
        with nullcontext() if self._options is None else self._compiled(self._whole):
            yield lambda: self._model.pipe(**arguments)

    @contextmanager
    def pruned(self) -> Iterator[Run]:
        """Call the pipeline with the SubNet."""
        arguments = self._arguments()
        with self._applied():
            yield lambda: self._model.pipe(**arguments)

    def peak_cache_bytes(self) -> int:
        """Run once and return the most that was cached at a time."""
        arguments = self._arguments()
        with self._applied() as handle:
            self._model.pipe(**arguments)
            return handle.peak_cache_bytes

    def _applied(self) -> SubNetHandle:
        handle = self._compiled(self._subnet)
        return handle.fuse() if self._fuse else handle

    def _compiled(self, subnet: SubNet) -> SubNetHandle:
        handle = apply_subnet(self._model.pipe, subnet)
        return handle if self._options is None else handle.compile(**self._options)

    @property
    def _whole(self) -> SubNet:
        gates = self._subnet.gates
        return replace(self._subnet, gates=GateTable.all_keep(gates.num_calls, gates.num_blocks))

    def _arguments(self) -> dict[str, Any]:
        """Return the arguments of a call, its noise anew."""
        sampler = self._subnet.sampler
        settings = SamplerSettings(
            scheduler=sampler["scheduler"],
            steps=int(sampler["steps"]),
            guidance_scale=float(sampler["guidance_scale"]),
        )
        seeds = range(len(self._items))
        arguments = call_arguments(self._model, self._items, seeds, settings)
        return {**arguments, **self._subnet.call_kwargs()}
