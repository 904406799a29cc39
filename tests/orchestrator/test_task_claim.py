"""A task that two workers do, one of them taken for dead: the first record is everybody's."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.records import Record, Task
from orchestrator.store import open_store
from orchestrator.task.run import RUNNERS, do_task
from orchestrator.task.work import Outcome, Work

TASK = Task(kind="race", inputs={"top": 1})


def of_a_rival(work: Work) -> Outcome:
    """Do the task, while another worker is faster."""
    rival = Record(key=TASK.key, kind="race", state="done", inputs=TASK.inputs, outputs={"by": 1})
    work.store.put_record(rival)
    return Outcome(outputs={"by": 2})


def test_worker_that_was_too_late_gives_the_record_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNNERS, "race", of_a_rival)
    store = open_store(tmp_path)
    assert do_task(TASK, store, lambda report: None).outputs == {"by": 1}
    assert store.records()[TASK.key].outputs == {"by": 1}
