"""Failures: classes and retries. Oracle: the table of issue 5, written out by hand."""

from __future__ import annotations

import pytest

from dipgo_core.errors import StorageError, StoreError, TaskError
from orchestrator.failures import (
    Failure,
    FailureClass,
    classify,
    failure_of,
    failure_record,
    next_attempt,
    wait_s,
)
from orchestrator.records import Record, Task, TaskKind


class OutOfMemoryError(RuntimeError):
    """Named as torch and ray name theirs."""


def evaluation(batch: int = 8, kind: TaskKind = "evaluate") -> Task:
    return Task(kind=kind, inputs={"n": 1}, options={"batch_size": batch}, label="it")


def failed(kind: FailureClass) -> Failure:
    return Failure(kind=kind, error=f"E: {kind}", host="here", seconds=2)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "out_of_memory"),
        (OutOfMemoryError("x"), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        (caused(TaskError("the search died"), OutOfMemoryError("x")), "out_of_memory"),
        (StoreError("torn"), "data"),
        (caused(TaskError("no record"), StorageError("input/output error")), "storage"),
        (ValueError("we ran out of memory"), "code"),
        (TaskError("no outcome"), "code"),
    ],
)
def test_classify_goes_by_name_and_cause(error: Exception, kind: str) -> None:
    assert classify(error) == kind


@pytest.mark.parametrize("kind", ["preempted", "node_lost"])
def test_next_attempt_never_counts_lost_nodes(kind: FailureClass) -> None:
    assert next_attempt(evaluation(), [failed(kind)] * 50) is not None


def test_next_attempt_gives_up_after_three_lost_workers() -> None:
    lost = failed("worker_lost")
    assert next_attempt(evaluation(), [lost, failed("node_lost"), lost]) is not None
    assert next_attempt(evaluation(), [lost] * 3) is None


def test_next_attempt_waits_half_a_minute_for_a_storage() -> None:
    attempts = [failed("storage")] * 6
    assert next_attempt(evaluation(), attempts) is not None
    assert next_attempt(evaluation(), [*attempts, failed("storage")]) is None
    assert sum(wait_s(attempts[:n]) for n in range(1, 7)) == 31


def test_failure_keeps_no_secret_whoever_makes_it() -> None:
    made = Failure(kind="worker_lost", error="http://me:secret-0@h", trace="http://me:secret-1@h")
    assert (made.error, made.trace) == ("http://***@h", "http://***@h")


@pytest.mark.parametrize("kind", ["data", "code"])
def test_next_attempt_gives_up_at_once(kind: FailureClass) -> None:
    assert next_attempt(evaluation(), [failed(kind)]) is None


def test_next_attempt_halves_the_batch_once_and_says_so() -> None:
    again = next_attempt(evaluation(9), [failed("out_of_memory")])
    assert again is not None
    assert again.key == evaluation().key
    assert again.options["batch_size"] == 4
    assert again.options["attempts"] == [
        {"failure": "out_of_memory", "error": "E: out_of_memory", "host": "here", "seconds": 2,
         "changed": {"batch_size": 4}}
    ]  # fmt: skip
    assert next_attempt(again, [failed("out_of_memory")] * 2) is None


def test_next_attempt_keeps_the_half_batch_after_another_loss() -> None:
    first = next_attempt(evaluation(8), [failed("out_of_memory")])
    assert first is not None
    second = next_attempt(first, [failed("out_of_memory"), failed("node_lost")])
    assert second is not None
    assert second.options["batch_size"] == 4
    assert [a["failure"] for a in second.options["attempts"]] == ["out_of_memory", "node_lost"]


def test_next_attempt_splits_the_batch_of_a_search() -> None:
    task = Task(kind="search", inputs={"search": {"batch_size": 4}})
    again = next_attempt(task, [failed("out_of_memory")])
    assert again is not None
    assert again.options["memory"] == {"images_at_once": 2}


@pytest.mark.parametrize("task", [evaluation(1), Task(kind="latency", inputs={"batch_size": 8})])
def test_next_attempt_gives_up_where_nothing_can_be_halved(task: Task) -> None:
    assert next_attempt(task, [failed("out_of_memory")]) is None


def test_wait_grows_and_is_bounded() -> None:
    waits = [wait_s([failed("node_lost")] * n) for n in range(1, 40)]
    assert waits[:4] == [0, 1, 2, 4]
    assert max(waits) == 60


def test_failure_record_keeps_what_a_reader_needs() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        failure = failure_of(error, seconds=3, log="/logs/w")
    kept = Record.from_json(failure_record(evaluation(), failure).to_json())
    assert kept.error == "ValueError: two; lines"
    assert kept.outputs["class"] == "code"
    assert kept.outputs["log"] == "/logs/w"
    assert "test_failures.py" in kept.outputs["traceback"]
