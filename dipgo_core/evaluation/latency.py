"""Latency of a pruned run against the dense one, the two interleaved on one device.

Runs come as dense, pruned, pruned, dense, dense, pruned, ...: which of a pair goes first changes
from pair to pair. A clock that sinks steadily, or a run that profits from what the one before left
in the caches, then pushes one ratio up and the next one down, instead of all of them the same way.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.device import device_name
from dipgo_core.evaluation.intervals import LEAST_FOR_MEDIAN, Interval, bootstrap_median
from dipgo_core.evaluation.stopwatch import Run, Timed, Timer, stopwatch_for, timed

#: Runs are warm when the median of the last WINDOW differs by less than STABLE from the median of
#: the WINDOW before them, for dense and pruned runs both.
WINDOW = 3
STABLE = 0.05

Pair = tuple[Timed, Timed]  # dense, pruned
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median of one kind of run with its 95 % interval, None of fewer pairs than LEAST_FOR_MEDIAN.

    Milliseconds, images per second, or for a speed-up dense / pruned of each interleaved pair.
    p95: the time that 95 % of runs stay below; None for what is no time.
    """

    value: float
    low: float | None
    high: float | None
    p95: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """Pairs that were run and not counted; stable: whether they had settled (None: not asked)."""

    pairs: int
    stable: bool | None


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One measurement. Figures of two devices, dtypes, batches or thread counts do not compare.

    `*_ms`: one run end to end; `loop_*`: its denoising loop alone, None where it was not timed.
    """

    latency_ms: Timing
    dense_latency_ms: Timing
    speedup: Timing
    loop_ms: Timing | None
    dense_loop_ms: Timing | None
    loop_speedup: Timing | None
    images_per_second: Timing
    dense_images_per_second: Timing
    warmup: WarmUp
    batch_size: int
    device: str
    threads: int
    dtype: str
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "versions": dict(self.versions)}


def measure_latency(
    run_dense: Run,
    run_pruned: Run,
    *,
    batch_size: int = 1,
    warmup: int = 2,
    max_warmup: int = 20,
    min_runs: int = 10,
    min_seconds: float = 5.0,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    timer: Timer | None = None,
    warmed: Callable[[], object] = lambda: None,
) -> Latency:
    """Time dense and pruned runs in turn until `min_runs` pairs and `min_seconds` are reached.

    Drifts of clock and load hit both alike, so the speed-up is the median of the pairs' ratios.
    An even number of pairs is counted. batch_size: images a run makes. warmup, max_warmup: pairs
    that are run and not counted, at least and at most; between them, until the times settle.
    timer: `stopwatch.timed` on the device if None; on a GPU, CUDA events give the times. warmed:
    called between the warm-up and the runs that count.

    Raises:
        EvaluationError: fewer than two runs asked for, or a run that took no time.
    """
    if min_runs < 2 or not 0 <= warmup <= max_warmup:
        raise EvaluationError(
            f"latency needs min_runs >= 2 and 0 <= warmup <= max_warmup, got {min_runs}, "
            f"{warmup} and {max_warmup}"
        )
    watch = stopwatch_for(device)
    pairs = _Pairs(run_dense, run_pruned, timer or (lambda run: timed(run, watch)))
    warm = _warm_up(pairs, warmup, max_warmup)
    warmed()
    counted = _counted(pairs, min_runs, min_seconds)
    dense, pruned = (np.array([pair[i].total_ms for pair in counted]) for i in (0, 1))
    return Latency(
        latency_ms=_time(pruned),
        dense_latency_ms=_time(dense),
        speedup=_timing(dense / pruned),
        **_loops(counted),
        images_per_second=_timing(1000 * batch_size / pruned),
        dense_images_per_second=_timing(1000 * batch_size / dense),
        warmup=warm,
        batch_size=batch_size,
        device=device_name(torch.device(device).type),
        threads=torch.get_num_threads(),
        dtype=dtype,
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )


class _Pairs:
    """Gives one timed pair after the other, the first run of a pair taking turns."""

    def __init__(self, run_dense: Run, run_pruned: Run, time_of: Timer) -> None:
        self._runs = (run_dense, run_pruned)
        self._time_of = time_of
        self._dense_first = cycle((True, False))

    def __call__(self) -> Pair:
        dense, pruned = self._runs
        if next(self._dense_first):
            pair = (self._time_of(dense), self._time_of(pruned))
        else:
            second, first = self._time_of(pruned), self._time_of(dense)
            pair = (first, second)
        if not min(run.total_ms for run in pair) > 0:
            raise EvaluationError("a timed run took no time: the timer is too coarse for it")
        return pair


def _warm_up(pairs: _Pairs, least: int, most: int) -> WarmUp:
    """Run pairs until their times have settled; `least` 0 means no warm-up at all."""
    if least == 0:
        return WarmUp(pairs=0, stable=None)
    done: list[Pair] = []
    while len(done) < most:
        done.append(pairs())
        if len(done) >= least and is_settled(done):
            return WarmUp(pairs=len(done), stable=True)
    return WarmUp(pairs=len(done), stable=False)


def is_settled(pairs: Sequence[Pair]) -> bool:
    """Say whether the last WINDOW runs of both kinds take as long as the WINDOW before them."""
    if len(pairs) < 2 * WINDOW:
        return False
    times = np.array([[run.total_ms for run in pair] for pair in pairs[-2 * WINDOW :]])
    before, last = np.median(times[:WINDOW], axis=0), np.median(times[WINDOW:], axis=0)
    return bool(np.all(np.abs(last / before - 1) < STABLE))


def _counted(pairs: _Pairs, min_runs: int, min_seconds: float) -> list[Pair]:
    counted: list[Pair] = []
    spent_ms = 0.0
    while len(counted) < min_runs or spent_ms < min_seconds * 1000 or len(counted) % 2:
        pair = pairs()
        spent_ms += sum(run.total_ms for run in pair)
        counted.append(pair)
    return counted


def _loops(pairs: Sequence[Pair]) -> dict[str, Timing | None]:
    """Return the timings of the denoising loops, if all runs had one timed."""
    times = [[run.loop_ms for run in pair] for pair in pairs]
    if any(loop is None for pair in times for loop in pair):
        return dict.fromkeys(("loop_ms", "dense_loop_ms", "loop_speedup"))
    dense, pruned = np.array(times, dtype=np.float64).T
    return {
        "loop_ms": _time(pruned),
        "dense_loop_ms": _time(dense),
        "loop_speedup": _timing(dense / pruned),
    }


def _timing(values: Floats) -> Timing:
    if len(values) < LEAST_FOR_MEDIAN:
        return Timing(value=float(np.median(values)), low=None, high=None, p95=None, n=len(values))
    median: Interval = bootstrap_median(values)
    return Timing(value=median.value, low=median.low, high=median.high, p95=None, n=len(values))


def _time(milliseconds: Floats) -> Timing:
    return replace(_timing(milliseconds), p95=float(np.quantile(milliseconds, 0.95)))
