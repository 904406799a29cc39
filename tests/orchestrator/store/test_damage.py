"""Damage is found and set aside, and the next run makes it again. Oracle: the bytes changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.store.damage import find_damage, set_aside

SHARD = Task(kind="images", inputs={"start": 0})
REFERENCE = Task(kind="reference", inputs={"stop": 8})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "store")
    digest = store.put_artifact(SHARD.key, "images", b"pixels")
    for task, fields in (
        (SHARD, {"artifacts": {"images": digest}}),
        (REFERENCE, {"outputs": {"shards": [SHARD.key]}}),
    ):
        values = {"key": task.key, "kind": task.kind, "state": "done", "inputs": task.inputs}
        store.put_record(Record(**{**values, **fields}))  # type: ignore[arg-type]
        store.put_task(task)
    store.put_blob(b"prompts")
    return store


@pytest.mark.parametrize("torn", [True, False])
def test_dense_run_without_a_shard_is_found_and_goes_with_it(store: Store, torn: bool) -> None:
    shard = f"records/{SHARD.key}.json"
    if torn:
        store.backend.put(shard, b"{")
    else:
        store.backend.delete(shard)
    found = list(find_damage(store))
    assert {name for each in found for name in each.objects} == {
        f"records/{REFERENCE.key}.json",
        *([shard] if torn else []),
    }
    for damage in found:
        set_aside(store, damage)
    assert len(store.records()) == 0


def cut(data: bytes) -> bytes:
    return data[:-1]


def test_whole_store_has_no_damage(store: Store) -> None:
    assert list(find_damage(store)) == []


@pytest.mark.parametrize("room", ["records", "blobs", "tasks"])
@pytest.mark.parametrize("damage", [cut, lambda data: b"", lambda data: data.replace(b"0", b"1")])
def test_damaged_object_is_found_and_set_aside(
    store: Store, room: str, damage: Callable[[bytes], bytes]
) -> None:
    name = max(store.backend.list(room))
    before = store.backend.get(name) or b""
    after = damage(before)
    if after == before:
        after = before + b"0"
    store.backend.put(name, after)
    found = next(find_damage(store))
    assert found.objects == (name,)
    assert name in found.problem
    for each in list(find_damage(store)):
        set_aside(store, each)
    assert store.backend.get(f"damaged/{name}") == after
    assert list(find_damage(store)) == []


@pytest.mark.parametrize("missing", [True, False])
def test_damaged_artifact_takes_its_record_and_what_reads_it_along(
    store: Store, missing: bool
) -> None:
    (artifact,) = store.backend.list("artifacts")
    if missing:
        store.backend.delete(artifact)
    else:
        store.backend.put(artifact, b"others")
    (found,) = find_damage(store)
    records = (f"records/{SHARD.key}.json", f"records/{REFERENCE.key}.json")
    assert found.objects == (*records, artifact)
    set_aside(store, found)
    assert len(store.records()) == 0
    assert list(find_damage(store)) == []
