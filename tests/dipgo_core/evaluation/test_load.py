"""Foreign load, by readings that are made up; and once by a real busy loop."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

import pytest

from dipgo_core.errors import DeviceError
from dipgo_core.evaluation.load import (
    QUIET,
    CpuTimes,
    CpuWatch,
    Finding,
    GpuWatch,
    cpu_finding,
    process_tree,
    read_cpu_times,
    undisturbed,
)


def window(*, others: float, own: float = 0.0, cores: int = 2, held: float = 0.0) -> list[CpuTimes]:
    """Ten seconds with that many cores busy."""
    began = CpuTimes(at=100, busy=50, own=5, cores=cores, held_back=1)
    ended = CpuTimes(
        at=110, busy=50 + 10 * (others + own), own=5 + 10 * own, cores=cores, held_back=1 + held
    )
    return [began, ended]


@pytest.mark.parametrize(
    ("others", "threads", "cores", "quiet"),
    [
        (0.0, 1, 2, True),
        (1.1, 1, 2, True),  # a core and more are left for one thread
        (1.3, 1, 2, False),
        (0.2, 2, 2, True),
        (0.4, 2, 2, False),
        (3.0, 4, 8, True),
        (0.1, 1, 1, True),
        (0.3, 1, 1, False),
    ],
)
def test_cpu_is_disturbed_when_others_leave_too_few_cores(
    others: float, threads: int, cores: int, quiet: bool
) -> None:
    finding = cpu_finding(window(others=others, own=threads, cores=cores), threads)

    assert (finding == QUIET) is quiet


def test_cpu_finding_says_who_had_what() -> None:
    finding = cpu_finding(window(others=1.5, own=0.5), 1)

    assert finding.disturbed == "other processes used 1.5 of 2 cores, which left 0.5 for 1 thread"


def seconds_of(*others: float, cores: int, threads: int) -> list[CpuTimes]:
    """Readings once a second, of that many foreign cores busy in each, and of all own threads."""
    busy = [0.0, *accumulate(each + threads for each in others)]
    return [
        CpuTimes(at=float(i), busy=busy[i], own=float(i * threads), cores=cores)
        for i in range(len(busy))
    ]


@pytest.mark.parametrize(
    ("others", "threads", "cores", "quiet"),
    [
        ([16.0] * 20 + [0.0] * 40, 8, 16, False),  # 5.3 cores on average leave 10.7 for 8 threads
        ([2.0, 0.0] * 10, 1, 2, False),  # 1.0 on average leaves 1.0 for 1 thread
        ([2.0] * 4 + [0.0] * 16, 1, 2, True),  # a fifth
        ([2.0] * 5 + [0.0] * 15, 1, 2, False),
        ([1.1] * 20, 1, 2, True),
    ],
)
def test_load_that_comes_and_goes_is_not_averaged_away(
    others: list[float], threads: int, cores: int, quiet: bool
) -> None:
    finding = cpu_finding(seconds_of(*others, cores=cores, threads=threads), threads)

    assert (finding == QUIET) is quiet


def test_finding_says_for_how_long_others_were_busy() -> None:
    finding = cpu_finding(seconds_of(2, 0, 0, 2, 0, cores=2, threads=1), 1)

    assert finding.disturbed == (
        "for 40% of the time other processes used 2.0 of 2 cores, which left 0.0 for 1 thread"
    )


def test_watch_reads_while_the_measurement_runs() -> None:
    """By the readings' own clock each is a second after the one before."""
    made = iter(seconds_of(*[2.0] * 2, *[0.0] * 1000, cores=2, threads=1))
    enough = threading.Event()
    taken: list[CpuTimes] = []

    def read() -> CpuTimes:
        taken.append(next(made))
        if len(taken) == 5:
            enough.set()
        return taken[-1]

    watch = CpuWatch(1, read=read, window_seconds=0.001)
    watch.start()
    enough.wait()
    finding = watch.stop()

    assert len(taken) >= 6
    assert finding == cpu_finding(taken, 1)


def test_limit_of_a_container_disturbs_when_it_holds_back() -> None:
    assert cpu_finding(window(others=0, held=0.4), 1) == QUIET
    assert "for 12% of the time" in str(cpu_finding(window(others=0, held=1.2), 1).disturbed)


def test_cpu_times_are_of_the_cores_this_process_may_use(tmp_path: Path) -> None:
    mine, tick = min(os.sched_getaffinity(0)), os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\n"
        f"cpu{mine} {tick} {tick} {tick} 700 700 {tick} {tick} {tick} {tick} 0\n"
        "cpu999 5 5 5 5 5 5 5 5 5 5\nintr 1\n"
    )
    (tmp_path / "cpu.stat").write_text("nr_throttled 3\nthrottled_usec 2500000\n")

    times = read_cpu_times(tmp_path, tmp_path)

    assert times.busy == 6  # user, nice, system, irq, softirq, steal; no idling, no guests twice
    assert times.held_back == 2.5
    assert times.cores == len(os.sched_getaffinity(0))


def test_cpu_that_tells_nothing_is_unchecked(tmp_path: Path) -> None:
    def nothing() -> CpuTimes:
        return read_cpu_times(tmp_path)

    finding = CpuWatch(1, read=nothing, sleep=lambda seconds: None).idle()

    assert finding.disturbed is None
    assert "no readable" in finding.unchecked[0]


def test_process_tree_has_descendants_and_nobody_else() -> None:
    tree = process_tree(os.getppid())

    assert {os.getpid(), os.getppid()} <= tree
    assert process_tree(os.getpid()) == {os.getpid()}
    assert 1 not in process_tree(os.getpid())


class FakeGpu:
    """A GPU with that load and these processes; None: it does not tell."""

    def __init__(self, busy: float | None = 0.0, *foreign: int, listed: bool = True) -> None:
        self._busy = busy
        self._pids = frozenset({*foreign, *([os.getpid()] if listed else [])})

    def busy_percent(self) -> float:
        if self._busy is None:
            raise DeviceError("the GPU does not tell its load: Not Supported")
        return self._busy

    def compute_pids(self) -> frozenset[int]:
        return self._pids


def gpu_watch(gpu: FakeGpu) -> GpuWatch:
    return GpuWatch(gpu, lambda: {os.getpid(), 77}, lambda seconds: None)  # type: ignore[arg-type]


def test_gpu_with_own_processes_only_is_quiet() -> None:
    assert gpu_watch(FakeGpu(2, 77)).idle() == QUIET


def test_gpu_that_works_while_this_process_waits_is_disturbed() -> None:
    finding = gpu_watch(FakeGpu(37)).idle()

    assert finding.disturbed == "the GPU was 37 % busy while this process waited"


def test_foreign_process_on_the_gpu_disturbs_before_during_and_after() -> None:
    watch = gpu_watch(FakeGpu(0, 999_999_999))

    assert watch.idle().disturbed == watch.stop().disturbed
    assert watch.stop().disturbed == "other processes use the GPU: 999999999"


def test_gpu_that_does_not_tell_is_unchecked() -> None:
    finding = gpu_watch(FakeGpu(None, listed=False)).idle()

    assert finding.disturbed is None
    assert [each.split(":")[0] for each in finding.unchecked] == [
        "load of the GPU",
        "processes on the GPU",
    ]


class Script:
    """A watch whose findings are given: before, during, after each measurement."""

    def __init__(self, *findings: str | None) -> None:
        self._findings: Iterator[str | None] = iter(findings)

    def idle(self) -> Finding:
        return Finding(next(self._findings), ("the moon",))

    def start(self) -> None: ...

    def stop(self) -> Finding:
        return self.idle()


def test_watches_are_stopped_when_a_measurement_fails() -> None:
    def fail() -> None:
        raise DeviceError("out of memory")

    watch = CpuWatch(1, sleep=lambda seconds: None)
    before = threading.active_count()
    with pytest.raises(DeviceError, match="out of memory"):
        undisturbed(fail, [watch], tries=1)
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("findings", "values", "expected"),
    [
        ([None] * 6, "xa", ("a", 2, None)),  # a better one comes
        ([None] * 9, "xyz", ("z", 3, None)),  # none does: the last
        ([None] * 3 + ["noise"] * 2, "xa", ("x", 3, None)),  # noise after it: the undisturbed one
        ([None] * 4 + ["noise", None, "noise"], "xa", ("x", 3, None)),
    ],
)
def test_value_that_is_not_good_is_measured_again(
    findings: list[str | None], values: str, expected: tuple[str, int, str | None]
) -> None:
    made = iter(values)
    watched = undisturbed(
        lambda: next(made),
        [Script(*findings)],
        sleep=lambda seconds: None,
        good=lambda value: value == "a",
    )
    assert (watched.value, watched.tries, watched.finding.disturbed) == expected


def measured(*findings: str | None, tries: int = 3) -> tuple[str | None, int, int, list[float]]:
    """Return why it was disturbed, tries, measurements made, pauses."""
    made: list[int] = []
    pauses: list[float] = []
    watched = undisturbed(
        lambda: made.append(1), [Script(*findings)], tries=tries, sleep=pauses.append
    )
    assert watched.finding.unchecked == ("the moon",)
    return watched.finding.disturbed, watched.tries, len(made), pauses


def test_undisturbed_measures_once_when_it_is_quiet() -> None:
    assert measured(None, None, None) == (None, 1, 1, [])


def test_disturbed_measurement_is_repeated_after_longer_and_longer_pauses() -> None:
    found = measured(None, "noise", None, None, None, "noise", None, None, None)
    assert found == (None, 3, 3, [2.0, 4.0])


def test_noise_before_a_measurement_is_waited_out() -> None:
    assert measured("noise", None, None, None) == (None, 2, 1, [2.0])


def test_last_try_measures_and_keeps_the_reason() -> None:
    found = measured("noise", "noise", "noise", "more noise", None)
    assert found == ("before the measurement, noise", 3, 1, [2.0, 4.0])
    assert measured(None, None, "noise", tries=1)[0] == "after the measurement, noise"


def test_real_busy_processes_are_seen() -> None:
    cores = len(os.sched_getaffinity(0))
    loop = [sys.executable, "-c", "print(flush=True)\nwhile True: pass"]
    busy = [subprocess.Popen(loop, stdout=subprocess.PIPE) for _ in range(cores)]
    try:
        for process in busy:
            assert process.stdout is not None
            process.stdout.readline()  # it runs
        finding = CpuWatch(threads=cores).idle()
    finally:
        for process in busy:
            process.kill()
            process.communicate()
    assert "other processes used" in str(finding.disturbed)
