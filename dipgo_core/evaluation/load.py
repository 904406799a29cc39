"""Foreign load: whether anything but the measuring process kept the device busy. No torch.

A measurement is looked at before, during and after. On a CPU it is **disturbed** when the cores
that others left free were fewer than the threads it used, with a margin of 15 % of these threads:
one thread on two cores bears 1.15 busy foreign cores, two threads bear 0.3. That must hold of the
whole time, and of each second but a fifth of them: a median of pairs bears a fifth that are slow,
and load that comes and goes is not averaged away. Foreign work is what /proc/stat counts on the
cores this process may use (time stolen by a hypervisor included) minus this process's own time. A
container's CPU limit disturbs when it held the process back for more than 5 % of the time, judged
over the whole and by the second alike. On a GPU, a foreign process with a compute context disturbs,
and so does a load above 5 % while this process sleeps. What cannot be read is said to be unchecked,
never assumed to be quiet.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dipgo_core.errors import DeviceError
from dipgo_core.evaluation.nvml import Gpu

T = TypeVar("T")

MARGIN = 0.15  # of the threads a measurement uses
HELD_BACK = 0.05  # share of the time
WINDOW_SECONDS = 1.0
BAD_WINDOWS = 0.2  # share of the time
BUSY_PERCENT = 5.0
IDLE_SECONDS = 0.5
GPU_IDLE_SECONDS = 1.2  # the driver's sample period is up to a second
PAUSE_SECONDS = 2.0

_PROC = Path("/proc")
_CGROUP = Path("/sys/fs/cgroup")
Sleep = Callable[[float], None]


@dataclass(frozen=True)
class Finding:
    """What one look found: why it is disturbed, what could not be checked, and why not."""

    disturbed: str | None = None
    unchecked: tuple[str, ...] = ()

    def merged(self, other: Finding) -> Finding:
        unchecked = tuple(dict.fromkeys((*self.unchecked, *other.unchecked)))
        return Finding(self.disturbed or other.disturbed, unchecked)


QUIET = Finding()


class Watch(Protocol):
    """Looks for load that is not of this process."""

    def idle(self) -> Finding:
        """Look while this process sleeps."""

    def start(self) -> None:
        """Begin to look; this process works from now on."""

    def stop(self) -> Finding:
        """Return what was found since `start`."""


# the processor ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CpuTimes:
    """Counters at one moment, in seconds. busy, own: of all cores together.

    cores: that this process may use. held_back: by a container's CPU limit, None where not told.
    """

    at: float
    busy: float
    own: float
    cores: int
    held_back: float | None = None


@dataclass
class CpuWatch:
    """Watches the cores this process may use, in windows of that many seconds.

    threads: how many of them a measurement needs.
    """

    threads: int
    read: Callable[[], CpuTimes] = field(default_factory=lambda: read_cpu_times)
    sleep: Sleep = time.sleep
    window_seconds: float = WINDOW_SECONDS
    _readings: _Readings | None = None

    def idle(self) -> Finding:
        self.start()
        self.sleep(IDLE_SECONDS)
        return self.stop()

    def start(self) -> None:
        self._readings = _Readings(self.read, self.window_seconds)

    def stop(self) -> Finding:
        assert self._readings is not None, "stop() comes after start()"
        try:
            return cpu_finding(self._readings.ended(), self.threads)
        except DeviceError as error:
            return Finding(unchecked=(f"load of the CPU: {error}",))


class _Readings:
    """Reads the counters from now on, once a window, in a thread that sleeps in between."""

    def __init__(self, read: Callable[[], CpuTimes], window_seconds: float) -> None:
        self._read = read
        self._window_seconds = window_seconds
        self._taken: list[CpuTimes] = []
        self._error: DeviceError | None = None
        self._over = threading.Event()
        self._take()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def ended(self) -> Sequence[CpuTimes]:
        """Stop, and return all readings, a last one included.

        Raises:
            DeviceError: one of them failed.
        """
        self._over.set()
        self._thread.join()
        self._take()
        if self._error is not None:
            raise self._error
        return self._taken

    def _go_on(self) -> None:
        while self._error is None and not self._over.wait(self._window_seconds):
            self._take()

    def _take(self) -> None:
        try:
            self._taken.append(self._read())
        except DeviceError as error:
            self._error = error


def cpu_finding(readings: Sequence[CpuTimes], threads: int) -> Finding:
    """Judge the time from the first reading to the last by the rule of this module."""
    whole = _cpu_trouble(readings[0], readings[-1], threads)
    if whole is not None:
        return Finding(whole)
    windows = [(a, b, _cpu_trouble(a, b, threads)) for a, b in pairwise(readings)]
    bad = [(b.at - a.at, trouble) for a, b, trouble in windows if trouble is not None]
    share = sum(seconds for seconds, _ in bad) / max(readings[-1].at - readings[0].at, 1e-6)
    if share > BAD_WINDOWS:
        return Finding(f"for {share:.0%} of the time {max(bad)[1]}")
    return QUIET


def _cpu_trouble(began: CpuTimes, ended: CpuTimes, threads: int) -> str | None:
    """Return what was wrong between two readings, on average."""
    seconds = max(ended.at - began.at, 1e-6)
    others = max(0.0, (ended.busy - began.busy) - (ended.own - began.own)) / seconds
    free = ended.cores - others
    if free < threads * (1 - MARGIN):
        return (
            f"other processes used {others:.1f} of {ended.cores} cores, which left "
            f"{max(0.0, free):.1f} for {threads} thread{'s' if threads > 1 else ''}"
        )
    held = ((ended.held_back or 0.0) - (began.held_back or 0.0)) / seconds
    if held > HELD_BACK:
        return f"the container's CPU limit held it back for {held:.0%} of the time"
    return None


def read_cpu_times(proc: Path = _PROC, cgroup: Path = _CGROUP) -> CpuTimes:
    """Read the counters of the cores this process may use.

    Raises:
        DeviceError: this system has no /proc/stat.
    """
    try:
        lines = (proc / "stat").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise DeviceError(f"{platform.system()} has no readable {proc}/stat") from error
    mine = os.sched_getaffinity(0)
    rows = (line.split() for line in lines if line.startswith("cpu"))
    busy = sum(_busy_ticks(row) for row in rows if row[0][3:].isdigit() and int(row[0][3:]) in mine)
    return CpuTimes(
        at=time.monotonic(),
        busy=busy / os.sysconf("SC_CLK_TCK"),
        own=sum(os.times()[:4]),
        cores=len(mine),
        held_back=_held_back(cgroup),
    )


def _busy_ticks(row: Sequence[str]) -> int:
    """Return user, nice, system, irq, softirq and steal; guests are counted as users already."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(each) for each in row[1:9])
    return user + nice + system + irq + softirq + steal


def _held_back(cgroup: Path) -> float | None:
    """Return the seconds this container was throttled (cgroup v2, else v1)."""
    names = {"throttled_usec": 1e-6, "throttled_time": 1e-9}
    for file in (cgroup / "cpu.stat", cgroup / "cpu" / "cpu.stat"):
        try:
            lines = file.read_text(encoding="ascii").splitlines()
        except OSError:
            continue
        for name, value in (line.split() for line in lines):
            if name in names:
                return int(value) * names[name]
    return None


# a GPU --------------------------------------------------------------------------------------------


@dataclass
class GpuWatch:
    """Watches one GPU. own: ids of this process and of those that belong to it."""

    gpu: Gpu
    own: Callable[[], Collection[int]]
    sleep: Sleep = time.sleep

    def idle(self) -> Finding:
        self.sleep(GPU_IDLE_SECONDS)
        return self._load().merged(self._processes())

    def start(self) -> None:
        """Begin nothing: the driver counts by itself."""

    def stop(self) -> Finding:
        return self._processes()

    def _load(self) -> Finding:
        try:
            busy = self.gpu.busy_percent()
        except DeviceError as error:
            return Finding(unchecked=(f"load of the GPU: {error}",))
        if busy > BUSY_PERCENT:
            return Finding(f"the GPU was {busy:.0f} % busy while this process waited")
        return QUIET

    def _processes(self) -> Finding:
        try:
            pids = self.gpu.compute_pids()
        except DeviceError as error:
            return Finding(unchecked=(f"processes on the GPU: {error}",))
        if os.getpid() not in pids:  # as in a container with process ids of its own
            reason = "its driver does not list this process, so others cannot be told from it"
            return Finding(unchecked=(f"processes on the GPU: {reason}",))
        foreign = sorted(pids - set(self.own()))
        if foreign:
            named = ", ".join(f"{pid}{_command(pid)}" for pid in foreign[:4])
            return Finding(f"other processes use the GPU: {named}")
        return QUIET


@dataclass(frozen=True)
class Unwatched:
    """Stands where a watch should be; reason: why there is none."""

    reason: str

    def idle(self) -> Finding:
        return Finding(unchecked=(self.reason,))

    def start(self) -> None:
        """Nothing can be looked at."""

    def stop(self) -> Finding:
        return self.idle()


def process_tree(root: int, proc: Path = _PROC) -> frozenset[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for folder in proc.glob("[0-9]*"):
        try:
            after_name = (folder / "stat").read_text(errors="replace").rpartition(")")[2]
        except OSError:
            continue  # it has ended
        children.setdefault(int(after_name.split()[1]), []).append(int(folder.name))
    found, waiting = set[int](), [root]
    while waiting:
        pid = waiting.pop()
        found.add(pid)
        waiting += children.get(pid, [])
    return frozenset(found)


def _command(pid: int) -> str:
    try:
        return f" ({(_PROC / str(pid) / 'comm').read_text().strip()})"
    except OSError:
        return ""


# measuring undisturbed ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched(Generic[T]):
    """A measurement and what was seen around it; `finding.disturbed` is None if it can be used."""

    value: T
    finding: Finding
    tries: int


def undisturbed(
    measure: Callable[[], T],
    watches: Sequence[Watch],
    *,
    tries: int = 3,
    pause_seconds: float = PAUSE_SECONDS,
    sleep: Sleep = time.sleep,
    good: Callable[[T], bool] = lambda value: True,
) -> Watched[T]:
    """Measure while nothing else runs; a disturbed measurement is repeated after a pause.

    The last try measures whatever was found before it, so that there is always a value. good:
    whether an undisturbed value ends the tries; if none does, the last undisturbed one is returned.
    """
    spare: Watched[T] | None = None
    for number in range(1, tries + 1):
        last = number == tries
        before = _joined((watch.idle() for watch in watches), "before")
        if before.disturbed is None or (last and spare is None):
            watched = _watched(measure, watches, before)
            quiet = watched.finding.disturbed is None
            if quiet and good(watched.value):
                return replace(watched, tries=number)
            spare = watched if quiet or (last and spare is None) else spare
        if last:
            break
        sleep(pause_seconds * number)
    assert spare is not None, "tries must be at least 1"
    return replace(spare, tries=tries)


def _watched(measure: Callable[[], T], watches: Sequence[Watch], before: Finding) -> Watched[T]:
    for watch in watches:
        watch.start()
    try:
        value = measure()
    finally:
        found = [watch.stop() for watch in watches]
    during = _joined(found, "during")
    after = _joined((watch.idle() for watch in watches), "after")
    return Watched(value, before.merged(during).merged(after), 1)


def _joined(findings: Iterable[Finding], when: str) -> Finding:
    whole = QUIET
    for found in findings:
        said = None if found.disturbed is None else f"{when} the measurement, {found.disturbed}"
        whole = whole.merged(replace(found, disturbed=said))
    return whole
