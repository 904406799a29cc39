"""Bench: what a SubNet gains on this machine, dense and pruned calls measured side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from dipgo_core.binding import scheduler_of
from dipgo_core.config import Convention, SamplerSettings
from dipgo_core.evaluation.side_by_side import Effort, PreparedRun, measure_side_by_side
from dipgo_core.evaluation.stopwatch import Run
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel
from dipgo_core.runtime import SubNetHandle, apply_subnet
from dipgo_core.sampling import call_arguments
from dipgo_core.subnet import SubNet

#: What is generated where nobody says; times do not depend on it.
DEFAULT_ITEM = Item("a photograph of an astronaut riding a horse", label=0)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What was measured.

    record: times, speed-ups, images a second, memory, energy, device and versions, as in a latency
    record. macs_speedup: dense / kept MACs of a run. peak_cache_bytes: the most that a run of the
    SubNet keeps at once. compile: options of torch.compile, None where nothing was compiled.
    """

    record: Mapping[str, Any]
    macs_speedup: Mapping[Convention, float]
    peak_cache_bytes: int
    compile: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {
            **self.record,
            "macs_speedup": dict(self.macs_speedup),
            "peak_cache_bytes": self.peak_cache_bytes,
            "compile_options": None if self.compile is None else dict(self.compile),
        }


def bench(
    model: LoadedModel,
    subnet: SubNet,
    *,
    effort: Effort | None = None,
    item: Item = DEFAULT_ITEM,
    compile: Mapping[str, Any] | None = None,
) -> Bench:
    """Measure the pipeline with and without the SubNet, by the SubNet's own sampler.

    item: what all images of a batch show. compile: options of torch.compile; the dense side's
    blocks are then compiled in the same way.

    Raises:
        SubNetMismatchError: the SubNet was made for another model or noise scheduler; the message
            says what works.
    """
    effort = effort or Effort()
    pair = _Pair(model, subnet, (item,) * effort.batch_size, compile)
    with pair.compiled():
        record = measure_side_by_side(
            model, PreparedRun(pair.dense), PreparedRun(pair.pruned), effort
        )
        peak = pair.peak_cache_bytes()
    return Bench(
        record=record,
        macs_speedup=macs_speedups(subnet),
        peak_cache_bytes=peak,
        compile=compile,
    )


def macs_speedups(subnet: SubNet) -> dict[Convention, float]:
    """Return dense / kept MACs of a run, as the SubNet counts them, in both conventions."""
    counted: dict[Convention, Mapping[str, Any]] = {
        "all": subnet.macs,
        "paper": subnet.macs["paper"],
    }
    return {name: each["dense"] / each["kept"] for name, each in counted.items()}


class _Pair:
    """The two ways to call one pipeline.

    Compiled code lives as long as a SubNet stays applied, so with `compile` both sides have one of
    their own applied throughout (the dense side's keeps everything) on two pipelines of the same
    parts. Without, the dense side is the plain pipeline.
    """

    def __init__(
        self,
        model: LoadedModel,
        subnet: SubNet,
        items: Sequence[Item],
        compile: Mapping[str, Any] | None,
    ) -> None:
        self._model, self._subnet, self._items, self._options = model, subnet, items, compile
        model.pipe.scheduler = scheduler_of(subnet)
        self._twin = copy.copy(model.pipe) if compile is not None else model.pipe
        self._kept: SubNetHandle | None = None
        apply_subnet(model.pipe, subnet).remove()  # refuses what does not fit before any run

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Keep both sides applied and compiled while the block lasts, if that was asked for."""
        if self._options is None:
            yield
            return
        gates = GateTable.all_keep(self._subnet.gates.num_calls, self._subnet.gates.num_blocks)
        whole = replace(self._subnet, gates=gates)
        with apply_subnet(self._twin, whole) as dense:
            dense.compile(**self._options)
            with apply_subnet(self._model.pipe, self._subnet) as pruned:
                pruned.compile(**self._options)
                self._kept = pruned
                yield

    @contextmanager
    def dense(self) -> Iterator[Run]:
        arguments = self._arguments()
        yield lambda: self._twin(**arguments)

    @contextmanager
    def pruned(self) -> Iterator[Run]:
        arguments = self._arguments()
        with self._applied():
            yield lambda: self._model.pipe(**arguments)

    def peak_cache_bytes(self) -> int:
        """Run once and return the most that was cached at a time."""
        arguments = self._arguments()
        with self._applied() as handle:
            self._model.pipe(**arguments)
            return handle.peak_cache_bytes

    def _applied(self) -> AbstractContextManager[SubNetHandle]:
        if self._kept is None:
            return apply_subnet(self._model.pipe, self._subnet)
        return nullcontext(self._kept)

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
