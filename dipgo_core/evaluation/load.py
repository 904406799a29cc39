"""Foreign load: whether anything but the measuring process kept the device busy. No torch.

A measurement is looked at before, during and after. On a CPU it is **disturbed** when the cores
that others left free were fewer than the threads it used, with a margin of 15 % of these threads:
one thread on two cores bears 1.15 busy foreign cores, two threads bear 0.3. Foreign work is what
/proc/stat counts on the cores this process may use (time stolen by a hypervisor included) minus
this process's own time. A container's CPU limit disturbs when it held the process back for more
than 5 % of the time. On a GPU, a foreign process with a compute context disturbs, and so does a
load above 5 % while this process sleeps. What cannot be read is said to be unchecked, never
assumed to be quiet.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dipgo_core.errors import DeviceError
from dipgo_core.evaluation.nvml import Gpu

T = TypeVar("T")

MARGIN = 0.15  # of the threads a measurement uses
HELD_BACK = 0.05  # share of the time
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
    """Watches the cores this process may use. threads: how many of them a measurement needs."""

    threads: int
    read: Callable[[], CpuTimes] = field(default_factory=lambda: read_cpu_times)
    sleep: Sleep = time.sleep
    _began: CpuTimes | None = None

    def idle(self) -> Finding:
        self.start()
        self.sleep(IDLE_SECONDS)
        return self.stop()

    def start(self) -> None:
        try:
            self._began = self.read()
        except DeviceError:
            self._began = None  # `stop` says why

    def stop(self) -> Finding:
        try:
            ended = self.read()
        except DeviceError as error:
            return Finding(unchecked=(f"load of the CPU: {error}",))
        return QUIET if self._began is None else cpu_finding(self._began, ended, self.threads)


def cpu_finding(began: CpuTimes, ended: CpuTimes, threads: int) -> Finding:
    """Judge the time between two readings by the rule of this module."""
    seconds = max(ended.at - began.at, 1e-6)
    others = max(0.0, (ended.busy - began.busy) - (ended.own - began.own)) / seconds
    free = ended.cores - others
    if free < threads * (1 - MARGIN):
        return Finding(
            f"other processes used {others:.1f} of {ended.cores} cores, which left "
            f"{max(0.0, free):.1f} for {threads} thread{'s' if threads > 1 else ''}"
        )
    held = ((ended.held_back or 0.0) - (began.held_back or 0.0)) / seconds
    if held > HELD_BACK:
        return Finding(f"the container's CPU limit held it back for {held:.0%} of the time")
    return QUIET


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
) -> Watched[T]:
    """Measure while nothing else runs; a disturbed measurement is repeated after a pause.

    The last try measures whatever was found before it, so that there is always a value.
    """
    for number in range(1, tries + 1):
        before = _joined((watch.idle() for watch in watches), "before")
        if before.disturbed is None or number == tries:
            watched = _watched(measure, watches, before)
            if watched.finding.disturbed is None or number == tries:
                return replace(watched, tries=number)
        sleep(pause_seconds * number)
    raise AssertionError("tries must be at least 1")


def _watched(measure: Callable[[], T], watches: Sequence[Watch], before: Finding) -> Watched[T]:
    for watch in watches:
        watch.start()
    value = measure()
    during = _joined([watch.stop() for watch in watches], "during")
    after = _joined((watch.idle() for watch in watches), "after")
    return Watched(value, before.merged(during).merged(after), 1)


def _joined(findings: Iterable[Finding], when: str) -> Finding:
    whole = QUIET
    for found in findings:
        said = None if found.disturbed is None else f"{when} the measurement, {found.disturbed}"
        whole = whole.merged(replace(found, disturbed=said))
    return whole
