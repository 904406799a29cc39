"""Runs tasks one after another in this process: no cluster, no second import of torch."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from orchestrator.executors.base import RunTask, TaskSource, attempt, local_device
from orchestrator.failures import Failure
from orchestrator.store import Store
from orchestrator.sweep_settings import TaskResources

_IDLE_S = 0.05


class InProcessExecutor:
    """Runs one task at a time. Ctrl-C ends the run; finished tasks are kept."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave nothing: nothing was entered."""

    def latency_device(self, resources: TaskResources) -> str:
        """Return the name of this machine's device."""
        return local_device(resources)

    def run(self, source: TaskSource, run_task: RunTask, store: Store) -> None:
        """Run tasks until the source is finished."""
        while not source.finished:
            source.tick()
            task = source.next_ready()
            if task is None:
                time.sleep(_IDLE_S)  # one that failed waits before it is tried again
                continue
            source.started(task.key, platform.node())
            report = _Report(source, task.key)
            result = attempt(task, store, run_task, report)
            if report.error is not None:  # of the run, not of the task
                raise report.error
            if isinstance(result, Failure):
                source.failed(task.key, result)
            else:
                source.done(result)


@dataclass(eq=False)
class _Report:
    """What a task tells meanwhile. error: what the source raised then, which ends the run."""

    source: TaskSource
    key: str
    error: Exception | None = None

    def __call__(self, report: Mapping[str, Any]) -> None:
        if self.error is None:
            try:
                self.source.tick()
                self.source.progress(self.key, report)
            except Exception as error:
                self.error = error
        if self.error is not None:
            raise self.error
