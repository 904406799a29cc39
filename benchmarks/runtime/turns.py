"""Contestants in turns: ratios of denoising loops, and what each block of a dense run takes."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from full_width import Bench, Size

from dipgo_core.binding import subnet_of
from dipgo_core.evaluation.intervals import bootstrap_median
from dipgo_core.evaluation.stopwatch import Stopwatch, stopwatch_for, timed_call
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.hooks import Forward, MethodHook
from dipgo_core.runtime import SubNetHandle, apply_subnet

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ready = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio with its 95 % interval, and the goal it has."""

    figure: str
    case: str
    calls: int
    rounds: int
    value: float
    low: float
    high: float
    goal: float
    speed_up: float | None = None
    macs_limit: float | None = None

    @property
    def met(self) -> str:
        if self.value >= self.goal:
            return "yes"
        return "within the interval" if self.high >= self.goal else "no"


class CpuTime:
    """CPU time of this process: what other work on the machine takes is not in it."""

    def mark(self) -> float:
        return time.process_time()

    def wait(self) -> None:
        """Nothing is pending."""

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1000


def watch_of(options: argparse.Namespace) -> Stopwatch:
    """Return the stopwatch asked for."""
    return CpuTime() if options.clock == "cpu" else stopwatch_for(options.device)


def loop_times(
    bench: Bench, contestants: Mapping[str, Ready], options: argparse.Namespace
) -> dict[str, Floats]:
    """Return the denoising loop's milliseconds of each contestant in each round.

    Another contestant goes first in every round. Getting ready (applying a SubNet, switching a
    cache on) is not timed; the first round is not counted.
    """
    watch = watch_of(options)
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with contestants[name]():
                found = timed_call(bench.call, bench.model.pipe.scheduler, bench.denoiser, watch)
            assert found.loop_ms is not None
            times[name].append(found.loop_ms)
    return {name: np.array(values[1:]) for name, values in times.items()}


def row_of(values: Floats, **facts: Any) -> Row:
    """Return the median of one ratio a round."""
    found = bootstrap_median(values)
    return Row(rounds=len(values), value=found.value, low=found.low, high=found.high, **facts)


def applied(
    bench: Bench, graph: BlockGraph, gates: GateTable, options: argparse.Namespace
) -> Callable[[], SubNetHandle]:
    """Return what applies a SubNet to the pipeline for as long as one run lasts."""
    subnet = subnet_of(bench.model, graph, bench.sampler, gates)

    def ready() -> SubNetHandle:
        handle = apply_subnet(bench.model.pipe, subnet)
        return handle.compile() if options.compile else handle

    return ready


def plain(bench: Bench, options: argparse.Namespace) -> Ready:
    """Return what leaves the pipeline as it is; its denoiser is compiled as a whole if asked to."""
    if not options.compile:
        return nullcontext
    denoiser: Any = bench.denoiser
    denoiser.compile()
    compiled, denoiser._compiled_call_impl = denoiser._compiled_call_impl, None

    @contextmanager
    def ready() -> Iterator[None]:
        denoiser._compiled_call_impl = compiled
        try:
            yield
        finally:
            denoiser._compiled_call_impl = None

    return ready


@dataclass
class BlockClock:
    """Times every block of dense runs; what each took is summed over a run's calls.

    Compiled blocks are timed in a SubNet that keeps everything, since a compiled whole has none.
    """

    bench: Bench
    graph: BlockGraph
    watch: Stopwatch
    whole: Ready
    runs: list[Floats] = field(default_factory=list)  # (N,) milliseconds; 0 is the whole denoiser

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with self.whole(), self._marked():
            yield

    @contextmanager
    def _marked(self) -> Iterator[None]:
        marks: list[list[tuple[Any, Any]]] = [[] for _ in self.graph.names]
        hooks = [
            MethodHook(self.bench.denoiser.get_submodule(name), "forward", self._timing(spans))
            for name, spans in zip(self.graph.names, marks, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.watch.wait()
        spent = [sum(self.watch.milliseconds(*span) for span in spans) for spans in marks]
        self.runs.append(np.array(spent))

    def _timing(self, spans: list[tuple[Any, Any]]) -> Any:
        def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            start = self.watch.mark()
            output = original(*args, **kwargs)
            spans.append((start, self.watch.mark()))
            return output

        return intercept

    def kept_shares(self, gates: GateTable, loops: Floats) -> Floats:
        """Return the share of each timed run's loop that `gates` keep.  # (rounds,)

        A call that is not skipped pays what no gate decides: inside the denoiser, and outside it
        the noise scheduler and guidance. A skipped call pays nothing, though its step is made.
        """
        counted = np.array(self.runs[-len(loops) :])
        own = np.column_stack([loops - counted[:, 1:].sum(axis=1), counted[:, 1:]])
        live = self.graph.close(gates).keep.mean(axis=0)
        return np.asarray(own @ live / loops)


def size_of(options: argparse.Namespace) -> Size:
    return Size(side=options.size, batch=options.batch, device=options.device, dtype=options.dtype)
