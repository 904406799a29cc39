"""What an executor is: something that takes ready tasks from a source and runs them somewhere."""

from __future__ import annotations

import logging
import platform
import traceback
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self

from dipgo_core.errors import TaskError
from dipgo_core.evaluation.device import device_name
from orchestrator.records import Record, Task
from orchestrator.store import Store
from orchestrator.sweep_settings import TaskResources

logger = logging.getLogger(__name__)

OnProgress = Callable[[Mapping[str, Any]], None]


class RunTask(Protocol):
    """Runs one task, stores its artifacts and its record, and returns the record."""

    def __call__(
        self, task: Task, store: Store, *, on_progress: OnProgress | None = None
    ) -> Record: ...


class TaskSource(Protocol):
    """Where tasks come from and results go to; the driver is one. Used from one thread."""

    def next_ready(self) -> Task | None:
        """Return a task whose needs are done, None if there is none at the moment."""

    @property
    def finished(self) -> bool:
        """Whether nothing is running or ready, and nothing more can become ready."""

    def progress(self, key: str, report: Mapping[str, Any]) -> None: ...

    def done(self, record: Record) -> None: ...

    def failed(self, key: str, error: str) -> None: ...


class Executor(Protocol):
    """Runs tasks until the source is finished; a failed task never stops the others.

    It is used inside a `with` block, which it leaves as it found the world.
    """

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def latency_device(self, resources: TaskResources) -> str:
        """Return the name of the device that latency tasks with these resources will run on.

        Raises:
            TaskError: there is no such device.
        """

    def run(self, source: TaskSource, run_task: RunTask, store: Store) -> None: ...


def local_device(resources: TaskResources) -> str:
    """Return the name of this machine's device.

    Raises:
        TaskError: another accelerator is asked for.
    """
    name = device_name("cuda" if resources.gpus else "cpu")
    wanted = resources.accelerator
    if wanted is not None and wanted.split("-")[0].lower() not in name.lower():
        raise TaskError(
            f"resources.latency.accelerator asks for {wanted!r}, this machine has {name!r}: leave "
            "it out, or run on a cluster that has one (--address)"
        )
    return name


def attempt(
    task: Task, store: Store, run_task: RunTask, on_progress: OnProgress | None
) -> Record | str:
    """Run a task; on an error keep it as the task's failure and return its text."""
    try:
        return run_task(task, store, on_progress=on_progress)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        logger.debug("%s failed", task.label or task.key, exc_info=True)
        store.put_failure(failure_record(task, text, traceback.format_exc()))
        return text


def failure_record(task: Task, error: str, trace: str = "") -> Record:
    """Build the record of a failure; `trace` is for whoever looks for the cause."""
    return Record(
        key=task.key,
        kind=task.kind,
        state="failed",
        inputs=task.inputs,
        outputs={"label": task.label, "traceback": trace},
        host={"hostname": platform.node()},
        error=error,
    )
