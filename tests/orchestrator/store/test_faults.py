"""Killed, full, slow, damaged storage: old or new, never a mix. Oracle: what was acknowledged."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_disk import FaultyOs, at, failing, slow
from stored_work import STEPS, TASK, work

from dipgo_core.errors import StorageError, StoreError
from orchestrator.records import Record
from orchestrator.store import Store, disk, lease, open_store


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> tuple[Path, int]:
    """Return a folder of stores, each of a worker killed at its n-th write, and how many."""
    top = tmp_path_factory.mktemp("killed")
    path = os.pathsep.join((str(repository / "tests" / "support"), str(repository)))
    ran = subprocess.run(
        [sys.executable, "-m", "stored_work", str(top)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return top, int(ran.stdout)


def acknowledged(log: Path) -> set[str]:
    return set(log.read_text().split()) if log.exists() else set()


def found(store: Store) -> dict[str, bool]:
    """Return which steps of the work the store shows, each whole; anything torn would raise."""
    record = store.get_record(TASK.key)
    curve = None if record is None else store.get_artifact(record, "curve.json")
    assert curve in (None, b"[1, 2]")
    report = store.get_sweep_file("tiny", "report/report.html")
    assert report in (None, b"new" * 1000)
    assert store.get_progress(TASK.key, "checkpoint") in (None, b"new" * 1000)
    return {"record": record is not None, "artifact": curve is not None, "report": bool(report)}


def test_worker_killed_at_any_write_leaves_old_or_new(killed: tuple[Path, int]) -> None:
    top, deaths = killed
    assert deaths > 50
    for number in range(1, deaths + 1):
        told, shown = acknowledged(top / f"{number}.log"), found(open_store(top / str(number)))
        assert not {step for step in told & set(shown) if not shown[step]} - {"artifact"}
        assert "artifact" not in told or "record" not in told or shown["artifact"]


def test_work_goes_on_after_a_kill_at_any_write(
    killed: tuple[Path, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top, deaths = killed
    monkeypatch.setattr(disk, "os", FaultyOs(lambda call, given: None))
    for number in range(1, deaths + 1):
        store, log = open_store(top / str(number)), tmp_path / str(number)
        work(store, b"new", log)
        assert acknowledged(log) == set(STEPS)
        assert all(found(store).values())
        assert store.get_task(TASK.key) == TASK
        for leftover in store.backend.leftovers(older_than_s=-1):
            store.backend.delete_leftover(leftover)
        assert not [path for path in (top / str(number)).rglob(".*")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def count_of_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    counting = FaultyOs(lambda call, given: None)
    with monkeypatch.context() as patch:
        patch.setattr(disk, "os", counting)
        work(open_store(tmp_path / "counted"), b"new", tmp_path / "counted.log")
    return len(counting.calls)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_disk_that_fails_at_any_write_is_a_clear_error_and_nothing_is_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    for number in range(1, count_of_writes(tmp_path, monkeypatch) + 1):
        store, log = open_store(tmp_path / str(number)), tmp_path / f"{number}.log"
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", FaultyOs(at(number, failing(error))))
            try:
                work(store, b"new", log)
            except StoreError as refused:
                assert os.strerror(error) in str(refused)
        found(store)
        with monkeypatch.context() as patch:
            patch.setattr(disk, "os", FaultyOs(lambda call, given: None))
            work(store, b"new", log)
        assert all(found(store).values())


def test_record_is_on_disk_with_its_name_before_it_is_acknowledged(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.backend.put("records/x", b"")
    calls = FaultyOs(lambda call, given: None)
    monkeypatch.setattr(disk, "os", calls)
    assert store.backend.put_if_absent("records/y", b"1")
    file = ["open", "write", "fsync", "close", "link", "unlink"]
    assert calls.calls == [*file, "open", "fsync", "close"]  # the folder last
    calls.calls.clear()
    store.backend.put("records/z", b"1", durable=True)
    assert calls.calls == [*file[:4], "replace", "open", "fsync", "close"]


def test_slow_storage_keeps_its_lease(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(lease, "LEASE_S", 5.0)
    monkeypatch.setattr(disk, "os", FaultyOs(slow(0.03)))
    with store.lease("tiny") as held:
        for _ in range(10):
            time.sleep(0.15)
            held.check()


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b""])
@pytest.mark.parametrize("room", ["records", "artifacts", "blobs", "tasks", "failures"])
def test_torn_files_are_told_and_mended_as_advised(
    store: Store, tmp_path: Path, room: str, damage: object
) -> None:
    assert store.folder is not None and callable(damage)
    work(store, b"new", tmp_path / "log")
    (record,) = store.records().values()
    digest = next(store.backend.list("blobs")).removeprefix("blobs/")
    store.put_failure(record)
    for file in (store.folder / room).rglob("*.*" if room != "blobs" else "*"):
        file.write_bytes(damage(file.read_bytes()))
    reads = {
        "records": lambda: store.get_record(TASK.key),
        "artifacts": lambda: store.get_artifact(record, "curve.json"),
        "blobs": lambda: store.get_blob(digest),
        "tasks": lambda: store.get_task(TASK.key),
        "failures": lambda: store.get_failure(TASK.key),
    }
    with pytest.raises(StoreError, match=r"(delete|--repair).* run .*again"):
        reads[room]()


@pytest.mark.parametrize(
    ("error", "passes"),
    [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOSPC, True), (errno.EROFS, False)],
)
def test_error_of_the_disk_tells_whether_waiting_may_mend_it(
    error: int, passes: bool, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "os", FaultyOs(lambda call, given: failing(error)(call, given)))
    with pytest.raises(StoreError) as told:
        store.put_task(TASK)
    assert isinstance(told.value, StorageError) is passes


def test_checkpoint_that_cannot_be_written_is_a_warning(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk, "os", FaultyOs(at(1, failing(errno.EIO))))
    store.put_progress(TASK.key, "checkpoint", b"lost")
    assert "is not kept" in caplog.text
    store.put_progress(TASK.key, "checkpoint", b"new")
    assert store.get_progress(TASK.key, "checkpoint") == b"new"


def test_claim_that_cannot_be_cleared_fails_no_task(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing_delete(prefix: str) -> None:
        raise StorageError("input/output error")

    record = Record(key=TASK.key, kind=TASK.kind, state="done", inputs=TASK.inputs)
    with store.claim(TASK.key):
        assert store.put_record(record)
        monkeypatch.setattr(store.backend, "delete_all", failing_delete)
    assert "claim" in caplog.text and store.has_record(TASK.key)


@pytest.mark.parametrize("room", ["progress", "derived"])
def test_torn_progress_counts_as_none(store: Store, room: str) -> None:
    assert store.folder is not None
    put, get = (getattr(store, f"{verb}_{room}") for verb in ("put", "get"))
    put(TASK.key, "state", b"x" * 100)
    (file,) = (store.folder / room / TASK.key).iterdir()
    for length in range(len(file.read_bytes())):
        file.write_bytes(file.read_bytes()[:-1])
        assert get(TASK.key, "state") is None, length
    put(TASK.key, "state", b"again")
    assert get(TASK.key, "state") == b"again"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 512 KiB; needs root."""
    place = tmp_path / "disk"
    place.mkdir()
    asked = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(asked, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_full_disk_is_a_clear_error_and_goes_on_when_there_is_space(
    small_disk: Path, tmp_path: Path
) -> None:
    store, filler = open_store(small_disk / "store"), small_disk / "filler"
    filler.write_bytes(b"x" * 440_000)
    with pytest.raises(StoreError, match=r"No space left on device.*free some space"):
        store.put_artifact(TASK.key, "images", b"x" * 200_000)
    assert list(store.backend.entries("")) == list(store.backend.leftovers(-1)) == []
    filler.unlink()
    work(store, b"new", tmp_path / "log")
    assert all(found(store).values())


def test_read_only_storage_can_be_read_and_says_so(small_disk: Path, tmp_path: Path) -> None:
    store = open_store(small_disk / "store")
    work(store, b"new", tmp_path / "log")
    remount = ["mount", "-o", "remount,{}", str(small_disk)]
    subprocess.run([part.format("ro") for part in remount], check=True)
    assert all(found(open_store(store.url)).values())
    with pytest.raises(StoreError, match=r"Read-only file system.*mount it writable"):
        store.put_sweep_file("tiny", "x", b"1")
    subprocess.run([part.format("rw") for part in remount], check=True)
    store.put_sweep_file("tiny", "x", b"1")
