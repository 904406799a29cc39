"""Store: what of a sweep lies where in a storage, and in which order it is written."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from dipgo_core.errors import StorageError, StoreError
from orchestrator.records import Record, Task, content_key
from orchestrator.store.backend import Backend
from orchestrator.store.conditional import check_backend
from orchestrator.store.documents import (
    MENDING,
    guarded,
    parse_object,
    parse_record,
    sealed,
    unguarded,
)
from orchestrator.store.holder import Holder
from orchestrator.store.index import RecordIndex
from orchestrator.store.lease import Lease, OnWait, held_lease, living_holder
from orchestrator.store.names import check_key, check_name, check_part, is_key

logger = logging.getLogger(__name__)

#: A file of a sweep that asks its driver to end.
STOP = "stop.json"
#: A file of a sweep that is there from its first run until all of it is done.
_BEGUN = "unfinished.json"
_CLEANING = "cleaning/lease"


class Store:
    """Where finished work lives. The first record of a key wins and is never overwritten.

    Its layout is in docs/store.md. It can be sent to other processes and shared by threads.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._index: RecordIndex | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self.backend, "_index": None}

    @property
    def url(self) -> str:
        return self.backend.url

    @property
    def folder(self) -> Path | None:
        """Return the folder the store lies in, None if it is no folder."""
        return self.backend.folder

    def put_record(self, record: Record) -> bool:
        """Write a done record unless its key has one; return whether this one was written.

        Failures and progress of the task are removed either way: the task is done.

        Raises:
            StoreError: the record is not done, or its key is not that of its kind and inputs.
        """
        expected = content_key({"kind": record.kind, "inputs": record.inputs})
        if record.state != "done" or record.key != expected:
            raise StoreError(
                f"record {record.key[:12]} of a {record.kind} task was refused: its state must be "
                f"'done' (is {record.state!r}) and its key {expected[:12]}, that of its inputs"
            )
        name = _document("records", record.key)
        won = self.backend.put_if_absent(name, sealed(record.to_json()))
        if self._index is not None:
            self._index.add(record.key)
        try:
            self.backend.delete(_document("failures", record.key))
            self.clear_progress(record.key)
        except StoreError as error:  # the record is there, and that is what counts
            logger.warning("what is left of %s stays: %s", record.key[:12], error)
        return won

    def get_record(self, key: str) -> Record | None:
        """Return the record of a key, None if there is none.

        Raises:
            StoreError: the file is torn or was edited.
        """
        return self._get_record("records", key)

    def has_record(self, key: str) -> bool:
        return self.backend.exists(_document("records", key))

    def records(self) -> RecordIndex:
        """Return a view of all records there are now; those of this object are added as they land.

        Each is read and checked when it is first asked for. The records that other processes add
        are in it after its `refresh()`, or the next call of this method, which returns the same.
        """
        if self._index is None:
            self._index = RecordIndex(self._record_keys, self._read_record)
        else:
            self._index.refresh()
        return self._index

    def put_artifact(self, key: str, name: str, data: bytes) -> str:
        """Write one file of a task and return its SHA-256, which belongs into the record.

        It lies under a name of its own content: whoever does the same task again, believing that
        the first worker is dead, never touches what the first record tells of.
        """
        digest = hashlib.sha256(data).hexdigest()
        self.backend.put(artifact_name(key, name, digest), data, durable=True)
        return digest

    def has_artifact(self, key: str, name: str, digest: str) -> bool:
        return self.backend.exists(artifact_name(key, name, digest))

    def get_artifact(self, record: Record, name: str) -> bytes:
        """Return the bytes of an artifact, verified against the digest in its record.

        Raises:
            StoreError: the record names no such artifact, or the file is missing or differs.
        """
        if name not in record.artifacts:
            raise StoreError(
                f"the {record.kind} record {record.key[:12]} has no artifact {name!r}; it has "
                f"{', '.join(sorted(record.artifacts)) or 'none'}"
            )
        digest = record.artifacts[name]
        file = artifact_name(record.key, name, digest)
        return self._verified(file, digest, MENDING)

    def put_blob(self, data: bytes) -> str:
        """Keep an input under its SHA-256, which is returned."""
        digest = hashlib.sha256(data).hexdigest()
        self.backend.put_if_absent(_blob(digest), data)
        return digest

    def get_blob(self, digest: str) -> bytes:
        """Return an input by its SHA-256.

        Raises:
            StoreError: it is missing or damaged.
        """
        name = _blob(digest)
        remedy = f"delete {self.backend.place(name)} and run the sweep again"
        return self._verified(name, digest, remedy)

    def put_task(self, task: Task) -> None:
        """Keep the specification, so that a worker needs only the key; the latest options count."""
        name, data = _document("tasks", task.key), json.dumps(task.to_json(), sort_keys=True)
        if self.backend.get(name) != data.encode():
            self.backend.put(name, data.encode())

    def get_task(self, key: str) -> Task:
        """Return the specification of a task.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        name = _document("tasks", key)
        place, data = self.backend.place(name), self.backend.get(name)
        remedy = f"delete {place} and run the sweep again"
        if data is None:
            raise StoreError(f"no task specification at {place}; run the sweep again to write it")
        try:
            task = Task.from_json(parse_object(data, place, remedy))
        except (KeyError, TypeError) as error:
            raise StoreError(f"{place} is not a task specification ({error}); {remedy}") from error
        if task.key != key:
            raise StoreError(f"{place} was edited: its inputs have another key; {remedy}")
        return task

    def has_task(self, key: str) -> bool:
        return self.backend.exists(_document("tasks", key))

    def task_keys(self) -> frozenset[str]:
        """Return the keys of all tasks whose specification is kept; one listing."""
        return frozenset(self._keys("tasks"))

    def put_progress(self, key: str, name: str, data: bytes) -> None:
        """Keep the state of an unfinished task (a search's checkpoint, a shard of images).

        A storage that fails at this moment is a warning: the task goes on without.
        """
        try:
            self.backend.put(_file("progress", key, name), guarded(data))
        except StorageError as error:
            logger.warning("progress of %s is not kept: %s", key[:12], error)

    def get_progress(self, key: str, name: str) -> bytes | None:
        """Return the state of an unfinished task, None if there is none, or a torn one."""
        return self._unguarded(_file("progress", key, name))

    def clear_progress(self, key: str) -> None:
        self.backend.delete_all(f"progress/{check_key(key)}")

    def put_derived(self, key: str, name: str, data: bytes) -> None:
        """Keep what follows from a record alone, but takes long; it may be deleted at any time."""
        self.backend.put(_file("derived", key, name), guarded(data))

    def get_derived(self, key: str, name: str) -> bytes | None:
        """Return what was derived, None if it is not there, or torn."""
        return self._unguarded(_file("derived", key, name))

    def put_failure(self, record: Record) -> None:
        """Keep the last failure of a task; `error` of the record says what happened."""
        self.backend.put(_document("failures", record.key), sealed(record.to_json()))

    def get_failure(self, key: str) -> Record | None:
        return self._get_record("failures", key)

    def failed_keys(self) -> frozenset[str]:
        """Return the keys of all tasks whose last attempt failed; one listing."""
        return frozenset(self._keys("failures"))

    def put_sweep_file(self, sweep: str, name: str, data: bytes) -> None:
        """Keep a file of a sweep, such as ``report/report.html``; nothing is written twice."""
        file = _sweep_file(sweep, name)
        if self.backend.get(file) != data:
            self.backend.put(file, data, durable=True)

    def get_sweep_file(self, sweep: str, name: str) -> bytes | None:
        return self.backend.get(_sweep_file(sweep, name))

    def sweep_file_place(self, sweep: str, name: str) -> str:
        """Return where a file of a sweep lies, for people."""
        return self.backend.place(_sweep_file(sweep, name))

    def sweep_files(self, sweep: str, folder: str) -> tuple[str, ...]:
        """Return the names of a sweep's files in one of its folders, such as ``report``."""
        top = _sweep_file(sweep, folder)
        return tuple(f"{folder}{name.removeprefix(top)}" for name in self.backend.list(top))

    @contextmanager
    def claim(self, key: str, on_wait: OnWait = lambda holder: None) -> Iterator[Lease]:
        """Wait until no other process works on this task, and keep others out meanwhile.

        on_wait: called every 2 s at least with the holder that is waited for; what it raises ends
        the wait.
        """
        prefix, what = f"claims/{check_key(key)}", f"task {key[:12]}"
        held = held_lease(
            self.backend, prefix, what=what, wait_s=math.inf, durable=False, on_wait=on_wait
        )
        with held as lease:
            yield lease
        try:
            if self.has_record(key):  # nobody needs to know any more who did it
                self.backend.delete_all(prefix)
        except StoreError as error:  # what was done is in the store, and that is what counts
            logger.warning("the claim of %s stays: %s", key[:12], error)

    @contextmanager
    def lease(self, sweep: str, wait_s: float = 0.0) -> Iterator[Lease]:
        """Hold the sweep for this driver; the lease of a driver that died is free.

        Raises:
            StoreError: another driver runs this sweep, and still does after `wait_s`, or the store
                is being cleaned; or the storage cannot hold a store.
        """
        what = f"sweep {sweep!r}"
        check_backend(self.backend)
        with held_lease(self.backend, _lease(sweep), what=what, wait_s=wait_s) as lease:
            if living_holder(self.backend, _CLEANING) is not None:
                with self._held_clean(wait_s):
                    pass  # it is over
            yield lease

    @contextmanager
    def cleaning(self) -> Iterator[Lease]:
        """Keep sweeps from starting, in order to remove what none needs.

        Both sides write their lease first and then look for that of the other, so that one of two
        at the same instant sees the other.

        Raises:
            StoreError: a sweep is being run, or another process cleans.
        """
        with self._held_clean(0.0) as lease:
            names = {name.split("/")[1] for name in self.backend.list("sweeps")}
            for sweep in sorted(names):
                runner = self.runner(sweep)
                if runner is not None:
                    raise StoreError(
                        f"sweep {sweep!r} in {self.url} is being run by {runner}: wait for it, or "
                        "stop it, then clean (`cache gc --dry-run` lists at any time)"
                    )
            yield lease

    def _held_clean(self, wait_s: float) -> AbstractContextManager[Lease]:
        what = "`cache gc` or `cache verify --repair`"
        return held_lease(self.backend, _CLEANING, what=what, wait_s=wait_s)

    def runner(self, sweep: str) -> Holder | None:
        """Return who runs a sweep at this moment, None if nobody does."""
        return living_holder(self.backend, _lease(sweep))

    def request_stop(self, sweep: str) -> None:
        """Ask whoever runs a sweep to end what is running and to start nothing more."""
        self.backend.put(_sweep_file(sweep, STOP), b"{}", durable=True)

    def stop_requested(self, sweep: str) -> bool:
        return self.backend.exists(_sweep_file(sweep, STOP))

    def clear_stop(self, sweep: str) -> None:
        """Forget what was asked of an earlier run; the driver does this once it has the lease."""
        self.backend.delete(_sweep_file(sweep, STOP))

    def begin(self, sweep: str) -> None:
        """Note that a sweep is on its way, whatever becomes of its driver."""
        self.backend.put(_sweep_file(sweep, _BEGUN), b"{}", durable=True)

    def end(self, sweep: str) -> None:
        """Note that everything of a sweep is done."""
        self.backend.delete(_sweep_file(sweep, _BEGUN))

    def unfinished_sweeps(self) -> tuple[str, ...]:
        """Return the sweeps that were begun and not ended."""
        names = (name.split("/") for name in self.backend.list("sweeps"))
        return tuple(parts[1] for parts in names if parts[2:] == [_BEGUN])

    def _record_keys(self) -> Iterator[str]:
        return self._keys("records")

    def _keys(self, room: str) -> Iterator[str]:
        names = self.backend.list(room)
        keys = (name.removeprefix(f"{room}/").removesuffix(".json") for name in names)
        return (key for key in keys if is_key(key))

    def _get_record(self, room: str, key: str) -> Record | None:
        name = _document(room, key)
        data = self.backend.get(name)
        return None if data is None else parse_record(data, key, self.backend.place(name))

    def _read_record(self, key: str) -> tuple[Record, int] | None:
        name = _document("records", key)
        data = self.backend.get(name)
        if data is None:
            return None
        return parse_record(data, key, self.backend.place(name)), len(data)

    def _unguarded(self, name: str) -> bytes | None:
        data = self.backend.get(name)
        found = None if data is None else unguarded(data)
        if data is not None and found is None:
            logger.warning("%s is torn and left aside", self.backend.place(name))
        return found

    def _verified(self, name: str, digest: str, remedy: str) -> bytes:
        data, place = self.backend.get(name), self.backend.place(name)
        if data is None:
            raise StoreError(f"{place} is missing; {remedy}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise StoreError(f"{place} is not what was written (its SHA-256 differs); {remedy}")
        return data


def _document(room: str, key: str) -> str:
    return f"{room}/{check_key(key)}.json"


def _file(room: str, key: str, name: str) -> str:
    return f"{room}/{check_key(key)}/{check_part(name)}"


def artifact_name(key: str, name: str, digest: str) -> str:
    """Return the name of an artifact in the storage."""
    return _file("artifacts", key, f"{check_key(digest)[:16]}-{check_part(name)}")


def _blob(digest: str) -> str:
    return f"blobs/{check_key(digest)}"


def _sweep_file(sweep: str, name: str) -> str:
    return "/".join(("sweeps", check_part(sweep), *check_name(name)))


def _lease(sweep: str) -> str:
    return _sweep_file(sweep, "lease")
