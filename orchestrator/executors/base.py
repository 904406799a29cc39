"""What an executor is: something that takes ready tasks from a source and runs them somewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

from dipgo_core.errors import TaskError
from dipgo_core.evaluation.device import device_name
from orchestrator.failures import Failure, failure_of
from orchestrator.records import Pool, Record, Task
from orchestrator.store import Store
from orchestrator.sweep_settings import TaskResources

logger = logging.getLogger(__name__)

OnProgress = Callable[[Mapping[str, Any]], None]


class RunTask(Protocol):
    """Runs one task, stores its artifacts and its record, and returns the record."""

    def __call__(
        self, task: Task, store: Store, *, on_progress: OnProgress | None = None
    ) -> Record: ...


@dataclass(frozen=True)
class Lane:
    """A worker that asks for work: what it occupies, and whose pipelines it has loaded.

    held: affinities, last used first.
    """

    pool: Pool
    held: tuple[str, ...] = ()


class TaskSource(Protocol):
    """Where tasks come from and results go to; the driver is one. Used from one thread.

    An executor calls `tick` at least once a second: leases, requests to stop and budgets are
    looked at there.
    """

    def next_ready(self, lane: Lane | None = None) -> Task | None:
        """Hand out a task whose needs are done, None if there is none for this lane at the moment.

        lane: None takes tasks of any pool.
        """

    def demand(self) -> Mapping[Pool, int]:
        """Return how many ready tasks nobody has been handed yet, by pool."""

    def pools(self) -> Mapping[Pool, Sequence[str]]:
        """Return what tasks that are not done occupy, with the settings of the file saying so."""

    def set_aside(self, pools: Collection[Pool]) -> None:
        """Note all pools that no node holds: other tasks do not wait for theirs."""

    @property
    def finished(self) -> bool:
        """Whether nothing is running, and nothing more will be handed out."""

    @property
    def draining(self) -> bool:
        """Whether nothing more is handed out, though tasks may still run."""

    def tick(self) -> None: ...

    def started(self, key: str, host: str) -> None: ...

    def progress(self, key: str, report: Mapping[str, Any]) -> None: ...

    def done(self, record: Record) -> None: ...

    def failed(self, key: str, failure: Failure) -> None:
        """Tell how an attempt failed; the source may hand the task out again."""


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
) -> Record | Failure:
    """Run a task and return its record, or how it failed."""
    began = time.monotonic()
    try:
        return run_task(task, store, on_progress=on_progress)
    except Exception as error:
        logger.debug("%s failed", task.label or task.key, exc_info=True)
        return failure_of(error, seconds=time.monotonic() - began)
