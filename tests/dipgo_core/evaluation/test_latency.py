"""Latency: interleaving, and figures of a clock whose ticks are known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.device import device_name
from dipgo_core.evaluation.latency import measure_latency, wall_milliseconds


class Clock:
    """A timer whose runs say how long they take; the machine gets slower with every run."""

    def __init__(self, drift: float = 0.0) -> None:
        self.runs: list[str] = []
        self._drift = drift

    def run(self, name: str, milliseconds: float) -> Callable[[], float]:
        def go() -> float:
            self.runs.append(name)
            return milliseconds * (1 + self._drift * len(self.runs))

        return go

    def __call__(self, run: Callable[[], object]) -> float:
        return float(run())  # type: ignore[arg-type]


def test_runs_are_interleaved_after_the_warm_up() -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), warmup=1, min_runs=3, min_seconds=0, timer=clock
    )

    assert clock.runs == ["d", "p"] * 4
    assert (latency.dense_latency_ms.value, latency.latency_ms.value) == (20, 5)
    assert (latency.speedup.low, latency.speedup.value, latency.speedup.high) == (4, 4, 4)
    assert latency.speedup.n == 3


def test_runs_go_on_until_the_seconds_are_reached() -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), min_runs=2, min_seconds=0.25, timer=clock
    )

    assert latency.speedup.n == 10


def test_drift_hits_both_and_leaves_the_speedup() -> None:
    clock = Clock(drift=0.05)

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), min_runs=30, min_seconds=0, timer=clock
    )

    assert latency.speedup.value == pytest.approx(4, rel=0.05)
    assert latency.dense_latency_ms.low < latency.dense_latency_ms.value
    assert latency.dense_latency_ms.value < latency.dense_latency_ms.p95


def test_measurement_says_where_and_how_it_was_made() -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 2), clock.run("p", 1), min_seconds=0, timer=clock, dtype="float16"
    )

    assert latency.to_json()["device"] == device_name()
    assert (latency.threads, latency.dtype) == (torch.get_num_threads(), "float16")


def test_wall_clock_measures_real_work() -> None:
    assert wall_milliseconds(lambda: sum(range(100_000))) > 0.1


def test_a_clock_that_stands_still_is_refused() -> None:
    clock = Clock()

    with pytest.raises(EvaluationError, match="took no time"):
        measure_latency(clock.run("d", 0), clock.run("p", 1), timer=clock)
    with pytest.raises(EvaluationError, match="min_runs >= 2"):
        measure_latency(clock.run("d", 1), clock.run("p", 1), min_runs=1, timer=clock)


@pytest.mark.gpu
def test_cuda_events_measure_the_device() -> None:
    matrix = torch.ones(2048, 2048, device="cuda")

    latency = measure_latency(
        lambda: matrix @ matrix @ matrix @ matrix, lambda: matrix @ matrix, device="cuda"
    )

    assert latency.speedup.value > 1
    assert latency.device == torch.cuda.get_device_name(0)
