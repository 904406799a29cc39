"""What may go from a store: only what nothing rests on. Oracle: what each file is written for."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dipgo_core.errors import StoreError
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.store.garbage import find_garbage, remove, used_up_shards
from orchestrator.store.holdings import holdings, kinds_of

SHARDS = [Task(kind="images", inputs={"keep": ["11"], "start": start}) for start in (0, 1)]
DENSE = Task(kind="images", inputs={"start": 0})
EVALUATE = Task(
    kind="evaluate", inputs={"keep": ["11"]}, options={"shards": [task.key for task in SHARDS]}
)
SEARCH = Task(kind="search", inputs={"seed": 1})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Return a store with two finished shards, what they feed and an unfinished search."""
    store = open_store(tmp_path / "store")
    for task in (*SHARDS, DENSE, EVALUATE):
        finish(store, task)
    store.put_progress(SEARCH.key, "checkpoint", b"1")
    store.put_failure(Record(key=SEARCH.key, kind="search", state="failed", inputs=SEARCH.inputs))
    return store


def finish(store: Store, task: Task) -> None:
    store.put_task(task)
    artifacts = {"images": store.put_artifact(task.key, "images", task.key.encode())}
    done = Record(
        key=task.key, kind=task.kind, state="done", inputs=task.inputs, artifacts=artifacts
    )
    store.put_record(done)


def make_old(store: Store, name: str) -> None:
    assert store.folder is not None
    os.utime(store.folder / name, (time.time() - 2 * 86400,) * 2)


def reasons(store: Store, **asked: object) -> dict[str, str]:
    return {each.entry.name: each.reason for each in find_garbage(store, **asked)}  # type: ignore[arg-type]


def test_store_without_garbage_keeps_everything(store: Store) -> None:
    assert reasons(store) == {}


def test_garbage_of_each_kind_is_found_and_removed(store: Store) -> None:
    assert store.folder is not None
    done, orphan = EVALUATE.key, "a" * 64
    late = store.put_artifact(done, "images", b"of a worker that was too late")
    store.put_progress(done, "batch", b"1")
    store.backend.put(f"claims/{done}/00000001.json", b"{}")
    for claimed in (SEARCH.key, "b" * 64):
        store.backend.put(f"claims/{claimed}/00000001.json", b"{}")
    store.put_artifact(orphan, "images", b"1")
    store.backend.put("probes/x", b"1")
    (store.folder / "records" / ".0.tmp").write_bytes(b"half")
    young = set(reasons(store))
    for name in [entry.name for entry in store.backend.entries("")] + ["records/.0.tmp"]:
        make_old(store, name)
    store.backend.put(f"claims/{'b' * 64}/00000001.beat", b"99")  # of a task that takes days
    found = reasons(store)
    (orphaned,) = store.backend.list(f"artifacts/{orphan}")
    after_a_day = {orphaned, "probes/x", f"claims/{SEARCH.key}/00000001.json", "records/.0.tmp"}
    assert young == {
        f"artifacts/{done}/{late[:16]}-images",
        f"progress/{done}/batch",
        f"claims/{done}/00000001.json",
    }
    assert set(found) == young | after_a_day
    for garbage in list(find_garbage(store)):
        remove(store, garbage)
    assert reasons(store) == {}
    assert store.get_artifact(store.records()[done], "images") == done.encode()
    assert store.get_progress(SEARCH.key, "checkpoint") == b"1"


def test_shards_go_only_if_asked_and_all_they_feed_is_done(store: Store) -> None:
    assert used_up_shards(store) == {task.key for task in SHARDS}  # never those of the dense run
    assert {name.split("/")[0] for name in reasons(store, shards=True)} == {"records", "artifacts"}
    larger = Task(kind="evaluate", inputs={"n": 2}, options={"shards": [SHARDS[1].key]})
    store.put_task(larger)
    assert used_up_shards(store) == {SHARDS[0].key}


def test_records_that_no_sweep_needs_go_with_their_artifacts(store: Store) -> None:
    found = reasons(store, needed={EVALUATE.key, DENSE.key})
    (artifact,) = store.backend.list(f"artifacts/{SHARDS[0].key}")
    assert f"records/{SHARDS[0].key}.json" in found
    assert artifact in found
    assert not [name for name in found if EVALUATE.key in name or DENSE.key in name]


def test_nothing_is_removed_while_a_sweep_runs_nor_runs_while_it_is(store: Store) -> None:
    running = pytest.raises(StoreError, match="'tiny'.*being run by process")
    with store.lease("tiny"), running, store.cleaning():
        pass
    cleaning = pytest.raises(StoreError, match="`cache gc`.* is being run by process")
    with store.cleaning(), cleaning, store.lease("tiny"):
        pass
    with store.lease("tiny"):
        pass


def test_kinds_are_told_by_one_listing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    real = store.backend.list

    def listing(room: str) -> Iterator[str]:
        listed.append(room)
        return real(room)

    monkeypatch.setattr(store.backend, "list", listing)
    assert len(kinds_of(store)) == 4
    assert listed == ["records"]


def test_images_of_an_interrupted_shard_stay_as_long_as_its_progress(store: Store) -> None:
    begun = Task(kind="images", inputs={"start": 4}).key
    store.put_artifact(begun, "images-000004", b"pixels")
    store.put_progress(begun, "piece-000004", b"made")
    for entry in list(store.backend.entries("")):
        make_old(store, entry.name)
    assert reasons(store) == {}


def test_holdings_count_every_object_once(store: Store) -> None:
    store.put_sweep_file("tiny", "report/report.html", b"12345")
    found = {(each.room, each.kind): each for each in holdings(store)}
    assert found["records", "images"].objects == 3
    assert found["artifacts", "evaluate"].size == len(EVALUATE.key)
    assert found["progress", "unfinished"].objects == 1
    assert found["sweeps", "tiny"].size == 5
    entries = list(store.backend.entries(""))
    assert sum(each.objects for each in found.values()) == len(entries)
    assert sum(each.size for each in found.values()) == sum(entry.size for entry in entries)
