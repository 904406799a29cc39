"""A lane: the function that a worker runs, task after task, until it is sent home."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from dipgo_core.errors import StoreError
from orchestrator.executors.base import OnProgress, RunTask, attempt
from orchestrator.executors.ray_tune.desk import Asking, Progress
from orchestrator.failures import Failure
from orchestrator.records import Record, held_after
from orchestrator.store import Store
from orchestrator.store.probe import echo_probe

_PROGRESS_EVERY_S = 2.0


def drain(lane: str, desk: Any, run_task: RunTask, store: Store, probe: str) -> None:
    """Ask for tasks and do them, in this process, until there are none; then return.

    probe: what the driver wrote into the store, and this node must be able to read.
    """
    threading.Thread(target=_leave_when_closed, args=(desk,), daemon=True).start()
    here = Asking(lane=lane, node=ray.get_runtime_context().get_node_id(), host=host_name())
    asking = _with_probe(here, store, probe)
    while (task := ray.get(desk.ask.remote(asking))) is not None:
        result = attempt(task, store, run_task, _reporter(desk, lane, task.key))
        asking = replace(
            here,
            held=held_after(asking.held, task.affinity, task.pool),
            result=_located(result, here.host),
        )


def host_name() -> str:
    """Return the address of this process's node: what a person would log in to."""
    return str(ray.util.get_node_ip_address())


def _with_probe(here: Asking, store: Store, probe: str) -> Asking:
    """Read the driver's probe and write one back for it to read."""
    try:
        return replace(here, written=echo_probe(store, probe))
    except StoreError as error:
        return replace(here, problem=str(error))


def _located(result: Record | Failure, host: str) -> Record | Failure:
    """Add to a failure where it happened and where this process writes what it prints."""
    return replace(result, host=host, log=_log()) if isinstance(result, Failure) else result


def _log() -> str | None:
    """Return the file that Ray has connected stderr with (Linux), None where it cannot be told."""
    shown = Path("/proc/self/fd/2")
    return str(shown.readlink()) if shown.exists() else None


def _reporter(desk: Any, lane: str, key: str) -> OnProgress:
    """Return a callback that reaches the driver at most every few seconds."""
    last = float("-inf")

    def report(progress: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_EVERY_S:
            last = time.monotonic()
            desk.tell.remote(Progress(lane, key, dict(progress)))

    return report


def _leave_when_closed(desk: Any) -> None:
    """End this process when the run is over, whatever it is doing: its task is not wanted."""
    try:
        ray.get(desk.closed.remote())
    except ray.exceptions.RayError:
        return  # the driver is gone, and Ray ends this worker
    time.sleep(1.0)  # lanes that wait go home in order
    os._exit(0)
