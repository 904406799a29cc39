"""One task from lock to record."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import torch

from dipgo_core import NUMERICS_VERSION
from dipgo_core.errors import StoreError
from dipgo_core.evaluation.device import cpu_name, device_name
from orchestrator.records import Record, Task, TaskKind
from orchestrator.store import LeaseLost, Store
from orchestrator.store.holder import Holder
from orchestrator.task.errors import run_errors
from orchestrator.task.evaluate import run_evaluate
from orchestrator.task.images import run_images
from orchestrator.task.latency import run_latency
from orchestrator.task.latency_process import stop_measuring
from orchestrator.task.loading import loading_seconds
from orchestrator.task.memory import return_freed_memory
from orchestrator.task.race import run_race
from orchestrator.task.reference import run_reference
from orchestrator.task.search import run_search
from orchestrator.task.statistics import run_statistics
from orchestrator.task.work import OnProgress, Outcome, Work

logger = logging.getLogger(__name__)


def _run_explore(work: Work) -> Outcome:
    from orchestrator.task.explore import run_explore  # optuna takes half a second to import

    return run_explore(work)


RUNNERS: dict[TaskKind, Callable[[Work], Outcome]] = {
    "reference": run_reference,
    "images": run_images,
    "statistics": run_statistics,
    "errors": run_errors,
    "search": run_search,
    "evaluate": run_evaluate,
    "latency": run_latency,
    "race": run_race,
    "explore": _run_explore,
}
_LIBRARIES = ("torch", "diffusers", "transformers", "torch-fidelity", "dipgo-sweep")


def do_task(task: Task, store: Store, on_progress: OnProgress, *, imports_s: float = 0.0) -> Record:
    """Do a task unless it is done; meanwhile no other process does it.

    imports_s: how long this process took to import what tasks need, if it did so for this one.
    """
    return_freed_memory()
    while True:
        try:
            return _do_claimed(task, store, on_progress, imports_s)
        except _ClaimLost as error:  # wait for who has it now, and go on from what is kept
            logger.warning("%s stops: %s", task.label or task.key[:12], error)


class _ClaimLost(Exception):
    """Another process was given this task meanwhile: this one slept, or lost the storage."""


def _do_claimed(task: Task, store: Store, on_progress: OnProgress, imports_s: float) -> Record:
    def waiting(holder: Holder | None) -> None:
        on_progress({"waits for": str(holder or "another process")})

    with store.claim(task.key, waiting) as claim:

        def report(figures: Mapping[str, Any]) -> None:
            try:
                claim.check()
            except LeaseLost as error:
                raise _ClaimLost(str(error)) from error
            on_progress(figures)

        known = store.get_record(task.key)
        if known is not None:
            return known
        if task.kind != "latency":
            stop_measuring()
        began, loaded = time.perf_counter(), loading_seconds()
        torch.set_num_threads(int(task.inputs.get("threads", max(1, round(task.cpus)))))
        work = Work(task, store, report)
        if work.device != "cpu":
            torch.cuda.reset_peak_memory_stats()
        outcome = RUNNERS[task.kind](work)
        record = Record(
            key=task.key,
            kind=task.kind,
            state="done",
            inputs=task.inputs,
            outputs=outcome.outputs,
            artifacts=outcome.artifacts,
            timings={
                "seconds": time.perf_counter() - began,
                "load": loading_seconds() - loaded,
                "imports": imports_s,
                "finished": time.time(),
            },
            host={**_host(work.device), **gpu_memory(task, work.device), "gpus": task.gpus},
            versions=_versions(),
            attempts=tuple(task.options.get("attempts", ())),
        )
        if store.put_record(record):
            return record
        first = store.get_record(task.key)  # somebody took this process for dead
        if first is None:
            raise StoreError(
                f"the record of {task.label or task.key[:12]} was refused since there is one, and "
                f"there is none in {store.url}: somebody deletes them; run again"
            )
        return first


def _host(device: str) -> Mapping[str, Any]:
    return {
        "hostname": platform.node(),
        "cpu": cpu_name(),
        "device": device_name(device),
        "pid": os.getpid(),
    }


def gpu_memory(task: Task, device: str) -> Mapping[str, Any]:
    """Return the most this process held of a GPU during the task, beside what was estimated."""
    if device == "cpu" or task.kind == "latency":  # which another process measures
        return {}
    return {
        "gpu_memory": {
            "estimated_bytes": task.options.get("estimated_bytes"),
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    }


def _versions() -> Mapping[str, str]:
    libraries = {name: version(name) for name in _LIBRARIES}
    numerics = str(NUMERICS_VERSION)
    return {**libraries, "numerics": numerics, "python": platform.python_version()}
