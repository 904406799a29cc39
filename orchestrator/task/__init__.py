"""Doing one task with the method's functions: the one caller of dipgo_core. No Ray, no MLflow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from orchestrator.records import Record, Task
from orchestrator.store import Store


def run_task(
    task: Task, store: Store, *, on_progress: Callable[[Mapping[str, Any]], None] | None = None
) -> Record:
    """Do one task and return its record, which is stored last; a task that is done is not repeated.

    torch is imported here, on first use, so that a driver that only hands tasks out never loads it.
    on_progress: called now and then with figures for people.

    Raises:
        DipgoError: the task cannot be done; the message says why.
    """
    began = time.perf_counter()
    from orchestrator.task.run import do_task

    imports_s = time.perf_counter() - began
    return do_task(task, store, on_progress or (lambda report: None), imports_s=imports_s)
