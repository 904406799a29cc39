"""Store: nothing overwritten, nothing torn goes unnoticed. Oracles: the file system, hashlib."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import StoreError
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store

TASK = Task(kind="search", inputs={"seed": 1}, label="a search")


def record(task: Task = TASK, **fields: Any) -> Record:
    values = {"key": task.key, "kind": task.kind, "state": "done", "inputs": task.inputs}
    return Record(**{**values, **fields})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def record_file(store: Store) -> Path:
    return store.folder / "records" / f"{TASK.key}.json"


PUT = """
import sys, time
from pathlib import Path
from orchestrator.records import Record, Task
from orchestrator.store import open_store
folder, number = Path(sys.argv[1]), int(sys.argv[2])
task = Task(kind="search", inputs={"seed": 1})
outputs = {"writer": number}
mine = Record(key=task.key, kind="search", state="done", inputs=task.inputs, outputs=outputs)
while not (folder / "go").exists():
    time.sleep(0.001)
print(open_store(folder).put_record(mine))
"""


def test_put_record_lets_one_of_many_processes_win(tmp_path: Path, repository: Path) -> None:
    commands = [[sys.executable, "-c", PUT, str(tmp_path), str(number)] for number in range(4)]
    writers = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=repository)
        for command in commands
    ]
    time.sleep(1)
    (tmp_path / "go").touch()
    answers = [writer.communicate(timeout=60)[0].strip() for writer in writers]
    stored = open_store(tmp_path).get_record(TASK.key)
    assert sorted(answers) == ["False", "False", "False", "True"]
    assert stored is not None
    assert stored.outputs["writer"] == answers.index("True")
    assert [path.stem for path in (tmp_path / "records").iterdir()] == [TASK.key]


def test_records_round_trip_and_the_first_is_kept(store: Store) -> None:
    assert store.put_record(record(outputs={"x": 1.5}))
    assert not store.put_record(record(outputs={"x": 2.5}))
    assert store.get_record(TASK.key) == record(outputs={"x": 1.5})
    assert dict(store.records()) == {TASK.key: record(outputs={"x": 1.5})}


@pytest.mark.parametrize("key", ["", "no key", "0" * 64])
def test_records_answer_none_for_what_is_not_there(store: Store, key: str) -> None:
    assert store.records().get(key) is None


def test_records_is_a_live_view(store: Store) -> None:
    records = store.records()
    assert TASK.key not in records
    assert len(records) == 0
    store.put_record(record())
    assert records[TASK.key] == record()


@pytest.mark.parametrize("damage", [lambda s: s[:-20], lambda s: s.replace('"x": 1', '"x": 2')])
def test_get_record_names_a_damaged_file_and_the_remedy(store: Store, damage: Any) -> None:
    store.put_record(record(outputs={"x": 1}))
    file = record_file(store)
    file.write_text(damage(file.read_text()))
    with pytest.raises(StoreError, match=f"{file.name}.*(torn|edited).*--repair"):
        store.get_record(TASK.key)


@pytest.mark.parametrize("text", ["[]", "{}", '{"key": "x"}', '{"surprise": 1}'])
def test_get_record_refuses_what_is_no_record(store: Store, text: str) -> None:
    store.put_record(record())
    record_file(store).write_text(text)
    with pytest.raises(StoreError, match=record_file(store).name):
        store.get_record(TASK.key)


def test_put_record_refuses_a_foreign_key_and_failures(store: Store) -> None:
    with pytest.raises(StoreError, match="key"):
        store.put_record(record(key="0" * 64))
    with pytest.raises(StoreError, match="'failed'"):
        store.put_record(record(state="failed"))


def test_put_record_refuses_figures_that_json_lacks(store: Store) -> None:
    with pytest.raises(StoreError, match="null"):
        store.put_record(record(outputs={"psnr": float("inf")}))


def test_artifacts_are_verified(store: Store) -> None:
    digest = store.put_artifact(TASK.key, "curve.json", b"{}")
    stored = record(artifacts={"curve.json": digest})
    assert digest == hashlib.sha256(b"{}").hexdigest()
    assert store.get_artifact(stored, "curve.json") == b"{}"
    (file,) = (store.folder / "artifacts" / TASK.key).iterdir()
    file.write_bytes(b"[]")
    with pytest.raises(StoreError, match=r"curve\.json.*SHA-256 differs.*--repair"):
        store.get_artifact(stored, "curve.json")
    with pytest.raises(StoreError, match=r"no artifact 'other'.*curve\.json"):
        store.get_artifact(stored, "other")


def test_blobs_are_kept_by_digest(store: Store) -> None:
    digest = store.put_blob(b"prompts")
    assert digest == hashlib.sha256(b"prompts").hexdigest()
    assert store.get_blob(store.put_blob(b"prompts")) == b"prompts"
    (store.folder / "blobs" / digest).unlink()
    with pytest.raises(StoreError, match="missing"):
        store.get_blob(digest)


def test_task_specifications_are_checked(store: Store) -> None:
    store.put_task(TASK)
    assert store.get_task(TASK.key) == TASK
    file = store.folder / "tasks" / f"{TASK.key}.json"
    file.write_text(json.dumps({**TASK.to_json(), "inputs": {"seed": 2}}))
    with pytest.raises(StoreError, match="edited"):
        store.get_task(TASK.key)
    file.unlink()
    with pytest.raises(StoreError, match="run the sweep again"):
        store.get_task(TASK.key)


def test_record_clears_progress_and_failure(store: Store) -> None:
    store.put_progress(TASK.key, "checkpoint.safetensors", b"123")
    store.put_failure(record(state="failed", error="too bad"))
    failure = store.get_failure(TASK.key)
    assert store.get_progress(TASK.key, "checkpoint.safetensors") == b"123"
    assert failure is not None
    assert failure.error == "too bad"
    store.put_record(record())
    assert store.get_progress(TASK.key, "checkpoint.safetensors") is None
    assert store.get_failure(TASK.key) is None


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".hidden", "x" * 300])
def test_names_cannot_leave_the_store(store: Store, name: str) -> None:
    with pytest.raises(StoreError):
        store.put_artifact(TASK.key, name, b"")
    with pytest.raises(StoreError):
        store.get_record(name)


def test_open_store_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be used as a folder"):
        open_store(tmp_path / "file")


def test_put_task_keeps_the_latest_options(store: Store) -> None:
    store.put_task(TASK)
    smaller = Task(kind="search", inputs={"seed": 1}, options={"batch_size": 2}, gpus=1.0)
    store.put_task(smaller)
    assert smaller.key == TASK.key
    assert store.get_task(TASK.key) == smaller
