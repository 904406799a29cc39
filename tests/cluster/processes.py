"""Processes that a test started: their trees, ended by id, and waits that say what they saw."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
PROC = Path("/proc")
Value = TypeVar("Value")


class TooLong(AssertionError):
    """Something did not happen within its bound."""


def wait_for(
    what: str, probe: Callable[[], Value], seconds: float, seen: Callable[[], str] = lambda: ""
) -> Value:
    """Return the first true answer of `probe`.

    Raises:
        TooLong: there was none within the bound; tells what `seen` says.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(0.1)
    raise TooLong(f"{what}: not within {seconds:g} s\n{seen()}")


@dataclass(frozen=True)
class Process:
    """A process by its id and start time, so that a reused id is nobody."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Process | None:
        fields = _stat(pid)
        return cls(pid, fields[19]) if fields else None

    @property
    def runs(self) -> bool:
        fields = _stat(self.pid)
        return bool(fields) and fields[0] != "Z" and fields[19] == self.started

    @property
    def title(self) -> str:
        """What it calls itself: its command line, "" if it is gone."""
        try:
            return (PROC / str(self.pid) / "cmdline").read_text(errors="replace")
        except OSError:
            return ""

    def send(self, signal_number: int) -> None:
        if self.runs:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal_number)


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/<pid>/stat after the name: state, parent, … ([] if gone)."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def tree(root: int) -> list[Process]:
    """Return a process and everything that descends from it, parents first."""
    parents: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        fields = _stat(int(folder.name)) if folder.name.isdigit() else []
        if fields:
            parents.setdefault(int(fields[1]), []).append(int(folder.name))
    found, todo = list[Process](), [root]
    while todo:
        pid = todo.pop(0)
        process = Process.of(pid)
        found += [process] if process is not None else []
        todo += parents.get(pid, [])
    return found


def kill_at_once(roots: Iterable[int]) -> list[Process]:
    """Kill whole trees as a power cut does: all are stopped first, then all are killed."""
    processes: dict[Process, None] = {}
    roots = list(roots)
    for _ in range(2):  # what was born while others were stopped is seen the second time
        for process in [each for root in roots for each in tree(root)]:
            process.send(signal.SIGSTOP)
            processes[process] = None
    for process in processes:
        process.send(signal.SIGKILL)
    wait_for(
        "killed processes end",
        lambda: not any(process.runs for process in processes),
        20,
        lambda: str([process for process in processes if process.runs]),
    )
    return list(processes)


@dataclass
class Child:
    """A process that a test started, with its output in files."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    printed: Path
    recorded: dict[Process, None] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def code(self) -> int | None:
        return self.process.poll()

    def stderr(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def stdout(self) -> str:
        return self.printed.read_text(encoding="utf-8", errors="replace")

    def told(self) -> str:
        """Return the ends of what it printed."""
        state = "running" if self.code is None else f"exit code {self.code}"
        ends = self.stdout()[-3000:], self.stderr()[-6000:]
        return f"{self.name} ({state})\n{ends[0]}\n--- stderr\n{ends[1]}"

    def wait(self, seconds: float) -> int:
        """Return the exit code."""
        wait_for(f"{self.name} ends", lambda: self.code is not None, seconds, self.told)
        code = self.code
        assert code is not None
        return code

    def kill(self) -> None:
        """Kill it and all its children at once."""
        self.recorded |= dict.fromkeys(kill_at_once([self.pid]))
        self.process.wait(timeout=20)


def start(
    name: str, command: list[str], folder: Path, environment: Mapping[str, str], cwd: Path
) -> Child:
    """Start a child of its own session; its output goes to `folder`/`name`.out and .err."""
    folder.mkdir(parents=True, exist_ok=True)
    log, printed = folder / f"{name}.err", folder / f"{name}.out"
    with log.open("wb") as errors, printed.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=dict(environment),
            cwd=cwd,
            start_new_session=True,
        )
    return Child(name, process, log, printed)
