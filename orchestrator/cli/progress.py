"""Progress of a run on stderr: live on a terminal, line by line elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, Self

from rich.console import Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from orchestrator.cli.show import console, say
from orchestrator.secrets import redact

#: Seconds over which the speed behind the remaining time is averaged.
SPEED_PERIOD_S = 600.0
#: Seconds between two lines about the same task where there is no terminal.
LINE_EVERY_S = 15.0


class Display(Protocol):
    """Shows what a run does; entered before the first task, left after the last."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...

    def totals(self, done: int, total: int) -> None:
        """Say how many tasks are done, of how many there are."""
        ...

    def started(self, key: str, label: str) -> None: ...

    def progress(self, key: str, report: Mapping[str, Any]) -> None: ...

    def ended(self, key: str, label: str, error: str | None) -> None: ...

    def again(self, key: str, label: str, error: str) -> None:
        """Say that an attempt failed, and that there will be another."""
        ...


def open_display() -> Display:
    """Return the live display for a terminal, the plain one for a pipe, a log or NO_COLOR."""
    live = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    return LiveDisplay() if live else LineDisplay()


def detail(report: Mapping[str, Any]) -> str:
    """Word a task's report: search step and loss, or images done."""
    if "search_step" in report:
        text = f"step {report['search_step']}/{report['num_steps']}"
        if report.get("loss") is not None:
            text += f", loss {report['loss']:.3f}"
        if report.get("compute_ratio") is not None:
            text += f", compute {report['compute_ratio']:.2f}"
        return text
    if "images" in report:
        return f"images {report['images']}/{report['of']}"
    return ", ".join(f"{name} {value}" for name, value in report.items())


class LiveDisplay:
    """A bar over all tasks, and a line for each running one, redrawn in place."""

    def __init__(self) -> None:
        self._all = Progress(
            TextColumn("tasks"),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            speed_estimate_period=SPEED_PERIOD_S,
        )
        self._running = Progress(
            TextColumn("  {task.description}", markup=False),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
        )
        self._console = console(stderr=True)
        self._live = Live(Group(self._all, self._running), console=self._console, transient=True)
        self._bar = self._all.add_task("tasks", total=None)
        self._ids: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def totals(self, done: int, total: int) -> None:
        self._all.update(self._bar, completed=done, total=total)

    def started(self, key: str, label: str) -> None:
        self._ids[key] = self._running.add_task(label, total=None, detail="")

    def progress(self, key: str, report: Mapping[str, Any]) -> None:
        if key in self._ids:
            self._running.update(self._ids[key], detail=detail(report))

    def ended(self, key: str, label: str, error: str | None) -> None:
        if key in self._ids:
            self._running.remove_task(self._ids.pop(key))
        if error is not None:
            self._console.print(redact(f"failed: {label}: {first_line(error)}"), markup=False)

    def again(self, key: str, label: str, error: str) -> None:
        self.ended(key, label, None)
        self._console.print(redact(f"tried again: {label}: {first_line(error)}"), markup=False)


class LineDisplay:
    """One line at the start, one now and then while a task runs, one when it ends."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._counts = (0, 0)
        self._labels: dict[str, str] = {}
        self._last: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def totals(self, done: int, total: int) -> None:
        first = self._counts == (0, 0)
        self._counts = (done, total)
        if first:
            self._line("tasks are in the store")

    def started(self, key: str, label: str) -> None:
        self._labels[key], self._last[key] = label, time.monotonic()

    def progress(self, key: str, report: Mapping[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last.get(key, now) >= LINE_EVERY_S:
            self._last[key] = now
            self._line(f"{self._labels[key]}: {detail(report)}")

    def ended(self, key: str, label: str, error: str | None) -> None:
        self._last.pop(key, None)
        outcome = "done" if error is None else "failed"
        self._line(f"{outcome} {label}{'' if error is None else f': {first_line(error)}'}")

    def again(self, key: str, label: str, error: str) -> None:
        self._last.pop(key, None)
        self._line(f"tried again {label}: {first_line(error)}")

    def _line(self, text: str) -> None:
        done, total = self._counts
        say(f"{time.monotonic() - self._began:7.1f} s [{done}/{total}] {text}", stderr=True)


def first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
