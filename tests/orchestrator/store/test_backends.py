"""What every storage must do: one contract for folders and S3. Oracles: the file system, moto."""

from __future__ import annotations

import pickle
import threading
import time

import pytest

from dipgo_core.errors import StoreError
from orchestrator.store import Store
from orchestrator.store.backend import Backend
from orchestrator.store.conditional import check_backend


@pytest.fixture
def backend(any_store: Store) -> Backend:
    return any_store.backend


def test_put_and_get_round_trip_and_replace(backend: Backend) -> None:
    assert backend.get("room/a") is None
    backend.put("room/a", b"one")
    backend.put("room/a", b"two", durable=True)
    assert backend.get("room/a") == b"two"
    assert backend.exists("room/a")
    assert not backend.exists("room/b")


def test_put_keeps_empty_and_large_content(backend: Backend) -> None:
    backend.put("empty", b"")
    backend.put("large", b"x" * 3_000_000)
    assert backend.get("empty") == b""
    assert backend.get("large") == b"x" * 3_000_000


def test_put_if_absent_writes_once(backend: Backend) -> None:
    assert backend.put_if_absent("room/a", b"one")
    assert not backend.put_if_absent("room/a", b"one")
    assert not backend.put_if_absent("room/a", b"two")
    assert backend.get("room/a") == b"one"


def test_put_if_absent_lets_one_of_many_threads_win(backend: Backend) -> None:
    won = []

    def write(number: int) -> None:
        if backend.put_if_absent("room/a", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert backend.get("room/a") == str(won[0]).encode()


def test_list_gives_the_names_below_a_prefix(backend: Backend) -> None:
    for name in ("rooms/a", "room/b/c", "room/a", "other"):
        backend.put(name, b"1")
    assert list(backend.list("room")) == ["room/a", "room/b/c"]
    assert list(backend.list("nothing")) == []


def test_entries_tell_size_and_time(backend: Backend) -> None:
    backend.put("room/a", b"123")
    (entry,) = backend.entries("")
    assert (entry.name, entry.size) == ("room/a", 3)
    assert abs(entry.modified - time.time()) < 60


def test_delete_takes_one_and_delete_all_takes_a_room(backend: Backend) -> None:
    for name in ("room/a", "room/b/c", "rooms/a"):
        backend.put(name, b"1")
    backend.delete("room/a")
    backend.delete("room/a")
    backend.delete_all("room")
    backend.delete_all("room")
    assert [entry.name for entry in backend.entries("")] == ["rooms/a"]


def test_backend_can_be_sent_to_another_process(any_store: Store) -> None:
    any_store.backend.put("room/a", b"1")
    any_store.records()
    assert pickle.loads(pickle.dumps(any_store)).backend.get("room/a") == b"1"


def test_check_backend_accepts_and_leaves_nothing(backend: Backend) -> None:
    check_backend(backend)
    assert list(backend.entries("")) == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a//b", "a/../b", "", ".", "a\0b", "x" * 300])
def test_names_that_lead_elsewhere_are_refused(backend: Backend, name: str) -> None:
    for call in (backend.get, backend.exists, backend.delete, backend.delete_all, backend.place):
        with pytest.raises(StoreError, match="no name in a store"):
            call(name)
    with pytest.raises(StoreError, match="no name in a store"):
        backend.put(name, b"")
    with pytest.raises(StoreError, match="no name in a store"):
        backend.put_if_absent(name, b"")
