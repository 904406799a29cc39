"""The index of records: what is asked of the storage, and what stays in memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.records import Record, Task
from orchestrator.store import Store, index, open_store
from orchestrator.store.folder import FolderBackend

TASKS = [Task(kind="search", inputs={"seed": seed}) for seed in range(20)]


class CountingBackend(FolderBackend):
    """A folder that counts what it is asked."""

    asked: list[str]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.asked = []

    def get(self, name: str) -> bytes | None:
        self.asked.append("get")
        return super().get(name)

    def exists(self, name: str) -> bool:
        self.asked.append("exists")
        return super().exists(name)

    def list(self, prefix: str):  # type: ignore[no-untyped-def]
        self.asked.append("list")
        return super().list(prefix)


def record(task: Task) -> Record:
    return Record(key=task.key, kind="search", state="done", inputs=task.inputs)


@pytest.fixture
def backend(tmp_path: Path) -> CountingBackend:
    for task in TASKS:
        open_store(tmp_path).put_record(record(task))
    return CountingBackend(tmp_path)


def test_one_listing_answers_what_there_is(backend: CountingBackend) -> None:
    records = Store(backend).records()
    assert all(task.key in records for task in TASKS)
    assert "0" * 64 not in records
    assert records.get("0" * 64) is None
    assert sorted(records) == sorted(task.key for task in TASKS)
    assert len(records) == len(TASKS)
    assert backend.asked == ["list"]


def test_a_record_is_read_once(backend: CountingBackend) -> None:
    records = Store(backend).records()
    for _ in range(3):
        assert records[TASKS[0].key] == record(TASKS[0])
    assert backend.asked == ["list", "get"]


def test_records_of_others_are_seen_when_told_or_refreshed(backend: CountingBackend) -> None:
    mine, others = Store(backend), open_store(backend.url)
    records = mine.records()
    one, two = (Task(kind="search", inputs={"seed": seed}) for seed in (100, 101))
    others.put_record(record(one))
    others.put_record(record(two))
    assert one.key not in records
    records.add(one.key)
    assert records[one.key] == record(one)
    assert two.key not in records
    records.refresh()
    assert two.key in records


def test_records_that_are_gone_are_forgotten(backend: CountingBackend) -> None:
    records = Store(backend).records()
    assert records[TASKS[0].key]
    backend.delete(f"records/{TASKS[0].key}.json")
    records.refresh()
    assert records.get(TASKS[0].key) is None


def test_memory_of_records_is_bounded(
    backend: CountingBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(backend.get(f"records/{TASKS[0].key}.json") or b"")
    monkeypatch.setattr(index, "KEPT_BYTES", 5 * size)
    records = Store(backend).records()
    for task in TASKS:
        assert records[task.key] == record(task)
    assert 1 <= len(records._kept) <= 6
    backend.asked.clear()
    assert records[TASKS[-1].key] == record(TASKS[-1])
    assert backend.asked == []  # the last used stay
