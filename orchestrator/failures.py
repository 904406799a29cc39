"""Failures of tasks: their class, whether a task is tried again and how, and what is kept of one.

Pure: exceptions are told by the names of their classes, so neither torch nor ray is imported.
"""

from __future__ import annotations

import platform
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from dipgo_core.errors import (
    ConfigError,
    EvaluationError,
    ModelFilesError,
    StorageError,
    StoreError,
    SubNetError,
    UnknownModelError,
)
from orchestrator.records import Record, Task
from orchestrator.secrets import redact

FailureClass = Literal[
    "out_of_memory", "preempted", "node_lost", "worker_lost", "storage", "data", "code"
]

#: What each class means, and what is done about it; `status` and docs/engine.md say it alike.
MEANING: Final[Mapping[str, str]] = {
    "out_of_memory": "memory was not enough; tried once more at half the batch",
    "preempted": "the cluster took the node back; tried again, never counted",
    "node_lost": "the node is gone; tried again, never counted",
    "worker_lost": "the worker's process died; tried again, at most twice",
    "storage": "the storage was out of reach or full; tried again for half a minute",
    "data": "files, prompts or records are missing or wrong; not tried again",
    "code": "the task raised an error; not tried again",
}

#: Nobody's fault: such tasks come back however often it happens.
UNCOUNTED: Final = frozenset({"preempted", "node_lost"})
#: How often a task comes back after what is told of it is no fault of its own, but may last.
RETRIES: Final[Mapping[FailureClass, int]] = {"worker_lost": 2, "storage": 6}
LONGEST_WAIT_S: Final = 60.0

_OUT_OF_MEMORY = frozenset({"OutOfMemoryError", "MemoryError"})
_OUT_OF_MEMORY_TEXT = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
_DATA = (
    ConfigError, EvaluationError, ModelFilesError, StoreError, SubNetError, UnknownModelError,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Failure:
    """How one attempt at a task failed.

    error: one line, ``Type: text``. log: path or URL of the worker's log. seconds: it had taken.
    """

    kind: FailureClass
    error: str
    trace: str = ""
    host: str = ""
    log: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        """Keep no secret, wherever the words come from: failures are stored and shown."""
        object.__setattr__(self, "error", redact(self.error))
        object.__setattr__(self, "trace", redact(self.trace))


def classify(error: BaseException) -> FailureClass:
    """Return the class of what a task raised, or of what that was caused by."""
    chain = list(_chain(error))
    if any(_is_out_of_memory(each) for each in chain):
        return "out_of_memory"
    if any(isinstance(each, StorageError) for each in chain):
        return "storage"
    return "data" if any(isinstance(each, _DATA) for each in chain) else "code"


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes; of a circle, each once."""
    seen = set[int]()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _is_out_of_memory(error: BaseException) -> bool:
    names = {each.__name__ for each in type(error).__mro__}
    told = isinstance(error, RuntimeError) and any(t in str(error) for t in _OUT_OF_MEMORY_TEXT)
    return bool(names & _OUT_OF_MEMORY) or told


def failure_of(error: BaseException, *, seconds: float = 0.0, log: str | None = None) -> Failure:
    """Return the failure of an error that is being handled in the process that ran the task."""
    return Failure(
        kind=classify(error),
        error=one_line(f"{type(error).__name__}: {error}"),
        trace="".join(traceback.format_exception(error)),
        host=platform.node(),
        log=log,
        seconds=seconds,
    )


def one_line(text: str) -> str:
    """Return text with its lines joined, so that a table or a log can show it."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def next_attempt(task: Task, failures: Sequence[Failure]) -> Task | None:
    """Return the task as it is tried again after the last of its failures, None to give up.

    failures: all so far, the last one of this very task. Earlier ones travel in its options, from
    which the record tells them.
    """
    last = failures[-1]
    if last.kind in UNCOUNTED:
        return _again(task, last, {})
    if last.kind in RETRIES:
        count = sum(failure.kind == last.kind for failure in failures)
        return _again(task, last, {}) if count <= RETRIES[last.kind] else None
    if last.kind == "out_of_memory" and not any(f.kind == last.kind for f in failures[:-1]):
        halved = half_batch(task)
        return None if halved is None else _again(task, last, halved)
    return None


def wait_s(failures: Sequence[Failure]) -> float:
    """Return how long a task waits before it is tried again: a cluster in trouble is not spun on.

    The first time not at all, then 1, 2, 4, … seconds.
    """
    count = len(failures)
    return 0.0 if count <= 1 else min(LONGEST_WAIT_S, 2.0 ** (min(count, 16) - 2))


def can_be_halved(task: Task) -> bool:
    """Say whether a task that ran out of memory would be tried again at half the batch."""
    earlier = task.options.get("attempts", ())
    halved = any(each["failure"] == "out_of_memory" for each in earlier)
    return not halved and half_batch(task) is not None


def half_batch(task: Task) -> dict[str, Any] | None:
    """Return the options that halve what a task holds at once, None where nothing can be halved.

    Batches that decide a result (latencies) are never halved; a search keeps its batch and splits
    it.
    """
    if task.kind == "search":
        memory = dict(task.options.get("memory", {}))
        at_once = memory.get("images_at_once") or task.inputs["search"].get("batch_size", 1)
        return {"memory": {**memory, "images_at_once": at_once // 2}} if at_once > 1 else None
    batch = task.options.get("batch_size", 1)
    return {"batch_size": batch // 2} if batch > 1 else None


def attempt_json(failure: Failure, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a record tells of an attempt that failed. changed: options of the next one."""
    return {
        "failure": failure.kind,
        "error": failure.error,
        "host": failure.host,
        "seconds": round(failure.seconds, 3),
        "changed": dict(changed),
    }


def _again(task: Task, failure: Failure, changed: Mapping[str, Any]) -> Task:
    earlier = task.options.get("attempts", ())
    attempts = [*earlier, attempt_json(failure, changed)]
    return replace(task, options={**task.options, **changed, "attempts": attempts})


def failure_record(task: Task, failure: Failure) -> Record:
    """Build what the store keeps of a task that was given up; whoever reads it finds the cause."""
    return Record(
        key=task.key,
        kind=task.kind,
        state="failed",
        inputs=task.inputs,
        outputs={
            "label": task.label,
            "class": failure.kind,
            "traceback": failure.trace,
            "log": failure.log,
        },
        timings={"seconds": failure.seconds},
        host={"hostname": failure.host},
        error=failure.error,
        attempts=tuple(task.options.get("attempts", ())),
    )
