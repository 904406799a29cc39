"""Latency: order of runs, warm-up, and figures of a clock whose ticks are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.device import device_name
from dipgo_core.evaluation.intervals import bootstrap_median
from dipgo_core.evaluation.latency import is_settled, measure_latency
from dipgo_core.evaluation.stopwatch import Run, Timed


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

    def __call__(self, run: Run) -> Timed:
        total = float(run())  # type: ignore[arg-type]
        return Timed(total, total / 2)


def test_pairs_are_interleaved_and_take_turns_in_going_first() -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), warmup=0, min_runs=3, min_seconds=0, timer=clock
    )

    assert clock.runs == ["d", "p", "p", "d"] * 2  # an even number of pairs
    assert (latency.dense_latency_ms.value, latency.latency_ms.value) == (20, 5)
    assert (latency.speedup.value, latency.speedup.n) == (4, 4)


@pytest.mark.parametrize(("pairs", "ends"), [(4, (None, None)), (6, (4, 4))])
def test_few_pairs_give_no_interval(pairs: int, ends: tuple[float | None, float | None]) -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), warmup=0, min_runs=pairs, min_seconds=0, timer=clock
    )

    assert latency.speedup.value == 4
    for figure in (latency.speedup, latency.loop_speedup):
        assert figure is not None
        assert (figure.low, figure.high) == ends
    assert (latency.latency_ms.low is None) == (ends[0] is None)


def test_only_times_have_a_95th_percentile() -> None:
    clock = Clock(drift=0.05)

    latency = measure_latency(clock.run("d", 20), clock.run("p", 5), min_seconds=0, timer=clock)

    assert latency.latency_ms.p95 is not None and latency.latency_ms.p95 > latency.latency_ms.value
    assert latency.images_per_second.p95 is None  # it would be the fastest twentieth
    assert latency.speedup.p95 is None


def test_warmed_is_called_between_the_warm_up_and_the_runs_that_count() -> None:
    clock = Clock()

    measure_latency(
        clock.run("d", 20),
        clock.run("p", 5),
        warmup=3,
        max_warmup=3,
        min_runs=2,
        min_seconds=0,
        timer=clock,
        warmed=lambda: clock.runs.append("warm"),
    )

    assert clock.runs.index("warm") == 2 * 3
    assert len(clock.runs) == 2 * 3 + 1 + 2 * 2


def test_runs_go_on_until_the_seconds_are_reached() -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), warmup=0, min_runs=2, min_seconds=0.25, timer=clock
    )

    assert latency.speedup.n == 10


def test_loop_and_throughput_are_timed_beside_the_whole() -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), batch_size=8, min_seconds=0, timer=clock
    )

    assert latency.loop_ms is not None
    assert latency.loop_speedup is not None
    assert (latency.loop_ms.value, latency.loop_speedup.value) == (2.5, 4)
    assert latency.images_per_second.value == 8 * 200
    assert latency.dense_images_per_second.value == 8 * 50


def test_drift_hits_both_and_leaves_the_speedup() -> None:
    clock = Clock(drift=0.05)

    latency = measure_latency(
        clock.run("d", 20), clock.run("p", 5), warmup=0, min_runs=30, min_seconds=0, timer=clock
    )

    assert latency.speedup.value == pytest.approx(4, rel=0.01)
    dense = latency.dense_latency_ms
    assert dense.low is not None and dense.p95 is not None
    assert dense.low < dense.value < dense.p95


def test_warm_up_ends_when_times_have_settled() -> None:
    times = iter([90, 9, 7, 60, *[50, 5, 5, 50] * 100])

    latency = measure_latency(
        lambda: None,
        lambda: None,
        warmup=1,
        min_seconds=0,
        timer=lambda run: Timed(float(next(times))),
    )

    assert (latency.warmup.pairs, latency.warmup.stable) == (
        7,
        True,
    )  # 1 slow pair of 3 is no median


def test_warm_up_that_never_settles_ends_at_its_most() -> None:
    clock = Clock(drift=0.5)

    latency = measure_latency(
        clock.run("d", 2), clock.run("p", 1), max_warmup=9, min_seconds=0, timer=clock
    )

    assert (latency.warmup.pairs, latency.warmup.stable) == (9, False)


def test_settled_looks_at_dense_and_pruned_both() -> None:
    steady = [(Timed(10), Timed(5))] * 6
    assert is_settled(steady)
    assert not is_settled(steady[:5])
    assert not is_settled(steady[:3] + [(Timed(10), Timed(6))] * 3)


@pytest.mark.parametrize("pairs", [6, 20])
def test_interval_of_the_ratio_covers_the_truth(pairs: int) -> None:
    """Skewed noise, spikes, a wandering clock, drift, and 1 % for whoever runs second."""
    rng = np.random.default_rng(pairs)
    covered = 0
    for _ in range(200):
        timer = _NoisyTimer(rng, pairs)
        found = measure_latency(
            timer.dense, timer.pruned, warmup=0, min_runs=pairs, min_seconds=0, timer=timer
        ).speedup
        assert found.low is not None and found.high is not None
        covered += found.low <= 2 <= found.high
    assert 0.90 <= covered / 200 <= 0.99


def test_going_first_always_would_miss_the_truth() -> None:
    """Why pairs take turns: the same noise, dense first in every pair."""
    rng = np.random.default_rng(40)
    covered = 0
    for _ in range(200):
        timer = _NoisyTimer(rng, 40)
        pairs = [(timer(timer.dense), timer(timer.pruned)) for _ in range(40)]
        found = bootstrap_median([dense.total_ms / pruned.total_ms for dense, pruned in pairs])
        covered += found.low <= 2 <= found.high
    assert covered / 200 < 0.85


class _NoisyTimer:
    """Dense takes twice as long as pruned, on a machine that is never quite the same."""

    def __init__(self, rng: np.random.Generator, pairs: int) -> None:
        count = 2 * pairs
        wander = np.cumsum(rng.normal(0, 0.005, count)) + np.linspace(0, 0.1, count)
        spikes = (rng.random(count) < 0.1) * rng.uniform(0.1, 1, count)
        second = np.arange(count) % 2 * 0.01
        self._slower = np.exp(rng.normal(0, 0.03, count) + wander + second) * (1 + spikes)
        self._runs = 0

    def dense(self) -> float:
        return 20.0

    def pruned(self) -> float:
        return 10.0

    def __call__(self, run: Run) -> Timed:
        self._runs += 1
        return Timed(float(run()) * float(self._slower[self._runs - 1]))  # type: ignore[arg-type]


def test_measurement_says_where_and_how_it_was_made() -> None:
    clock = Clock()

    latency = measure_latency(
        clock.run("d", 2), clock.run("p", 1), min_seconds=0, timer=clock, dtype="float16"
    )

    assert latency.to_json()["device"] == device_name()
    assert (latency.threads, latency.dtype) == (torch.get_num_threads(), "float16")


def test_without_a_timer_real_work_is_timed() -> None:
    latency = measure_latency(
        lambda: sum(range(200_000)), lambda: sum(range(1000)), min_runs=4, min_seconds=0
    )

    assert latency.dense_latency_ms.value > 0.1
    assert latency.loop_ms is None


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
