"""A task that two workers do, one of them taken for dead: the first record is everybody's."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import StoreError
from orchestrator.records import Record, Task
from orchestrator.store import Store, lease, open_store
from orchestrator.task.run import RUNNERS, do_task
from orchestrator.task.work import Outcome, Work

TASK = Task(kind="race", inputs={"top": 1})


def of_a_rival(work: Work) -> Outcome:
    """Do the task, while another worker is faster."""
    rival = Record(key=TASK.key, kind="race", state="done", inputs=TASK.inputs, outputs={"by": 1})
    work.store.put_record(rival)
    return Outcome(outputs={"by": 2})


@contextmanager
def threading_claim(store: Store, over: threading.Event) -> Iterator[None]:
    """Hold the task's claim in another thread until `over` is set."""
    held = threading.Event()

    def hold() -> None:
        with store.claim(TASK.key):
            held.set()
            over.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    yield
    thread.join()


def test_worker_that_was_too_late_gives_the_record_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNNERS, "race", of_a_rival)
    store = open_store(tmp_path)
    assert do_task(TASK, store, lambda report: None).outputs == {"by": 1}
    assert store.records()[TASK.key].outputs == {"by": 1}


def test_worker_that_lost_its_claim_stops_and_goes_on_when_the_other_lets_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def slept(work: Work) -> Outcome:
        """Be taken for dead during the first try, by a worker that lets go of the task."""
        begun.append(1)
        if len(begun) == 1:
            claims = f"claims/{TASK.key}"
            work.store.backend.put(f"{claims}/00000002.json", b"null")
            work.store.backend.put(f"{claims}/00000002.beat", b"released")
            while True:
                work.report({"step": 1})
        return Outcome(outputs={"by": len(begun)})

    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    monkeypatch.setitem(RUNNERS, "race", slept)
    assert do_task(TASK, open_store(tmp_path), lambda report: None).outputs == {"by": 2}


def test_who_waits_for_a_claim_reports_for_whom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, told, over = open_store(tmp_path), list[Mapping[str, Any]](), threading.Event()
    monkeypatch.setitem(RUNNERS, "race", lambda work: Outcome(outputs={}))

    def report(figures: Mapping[str, Any]) -> None:
        told.append(figures)
        over.set()

    with threading_claim(store, over):
        do_task(TASK, store, report)
    assert "process" in told[0]["waits for"]


def test_record_that_was_refused_and_is_not_there_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(tmp_path)
    monkeypatch.setitem(RUNNERS, "race", lambda work: Outcome(outputs={}))
    monkeypatch.setattr(store, "put_record", lambda record: False)
    with pytest.raises(StoreError, match="was refused since there is one, and there is none"):
        do_task(TASK, store, lambda report: None)
