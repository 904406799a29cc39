"""Runs tasks one after another in this process: no cluster, no second import of torch."""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Self

from orchestrator.executors.base import RunTask, TaskSource, attempt, local_device
from orchestrator.store import Store
from orchestrator.sweep_settings import TaskResources


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
        """Run tasks until the source is finished.

        Raises:
            RuntimeError: the source is not finished, yet has no task that could be run.
        """
        while not source.finished:
            task = source.next_ready()
            if task is None:
                raise RuntimeError("the plan waits for a task that nobody runs")
            result = attempt(task, store, run_task, partial(source.progress, task.key))
            if isinstance(result, str):
                source.failed(task.key, result)
            else:
                source.done(result)
