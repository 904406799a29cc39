"""Latency of a pruned run against the dense one, the two interleaved on one device."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.device import device_name
from dipgo_core.evaluation.intervals import Interval, bootstrap_median

Run = Callable[[], object]
#: Runs once and returns how long it took, in milliseconds.
Timer = Callable[[Run], float]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Median of one kind of run with its 95 % interval and its 95th percentile.

    Milliseconds, or for a speed-up dense / pruned of each interleaved pair.
    """

    value: float
    low: float
    high: float
    p95: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Latency:
    """One measurement. Figures of two devices, dtypes or thread counts are never compared."""

    latency_ms: Timing
    dense_latency_ms: Timing
    speedup: Timing
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
    warmup: int = 2,
    min_runs: int = 10,
    min_seconds: float = 5.0,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    timer: Timer | None = None,
) -> Latency:
    """Time dense, pruned, dense, pruned, ... until `min_runs` pairs and `min_seconds` are reached.

    Drifts of clock and load hit both alike, so the speed-up is the median of the pairs' ratios.
    warmup: pairs that are run and not counted. On a GPU, CUDA events give the times.

    Raises:
        EvaluationError: fewer than two runs asked for, or a run that took no time.
    """
    if min_runs < 2 or warmup < 0:
        raise EvaluationError(
            f"latency needs min_runs >= 2 and warmup >= 0, got {min_runs} and {warmup}"
        )
    place = torch.device(device)
    time_of = timer or (cuda_milliseconds if place.type == "cuda" else wall_milliseconds)
    for _ in range(warmup):
        run_dense()
        run_pruned()
    dense, pruned = _interleaved(run_dense, run_pruned, time_of, min_runs, min_seconds)
    return Latency(
        latency_ms=_timing(pruned),
        dense_latency_ms=_timing(dense),
        speedup=_timing(dense / pruned),
        device=device_name(place.type),
        threads=torch.get_num_threads(),
        dtype=dtype,
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )


def wall_milliseconds(run: Run) -> float:
    """Time one run by the wall clock."""
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1000


def cuda_milliseconds(run: Run) -> float:
    """Time one run by CUDA events, from an idle device to an idle device."""
    new_event: Callable[..., Any] = torch.cuda.Event
    start, end = new_event(enable_timing=True), new_event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def _interleaved(
    run_dense: Run, run_pruned: Run, time_of: Timer, min_runs: int, min_seconds: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    pairs: list[tuple[float, float]] = []
    spent_ms = 0.0
    while len(pairs) < min_runs or spent_ms < min_seconds * 1000:
        pair = (time_of(run_dense), time_of(run_pruned))
        if not min(pair) > 0:
            raise EvaluationError("a timed run took no time: the timer is too coarse for it")
        spent_ms += sum(pair)
        pairs.append(pair)
    table = np.array(pairs)
    return table[:, 0], table[:, 1]


def _timing(values: npt.NDArray[np.float64]) -> Timing:
    median: Interval = bootstrap_median(values)
    p95 = float(np.quantile(values, 0.95))
    return Timing(value=median.value, low=median.low, high=median.high, p95=p95, n=len(values))
