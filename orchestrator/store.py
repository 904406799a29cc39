"""Store: records and artifacts under content keys, each written once, in a folder workers share."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from dipgo_core.errors import StoreError
from orchestrator.records import Record, Task, content_key

logger = logging.getLogger(__name__)

_KEY = re.compile(r"[0-9a-f]{64}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")


class Store(Protocol):
    """Where finished work lives. The first record of a key wins and is never overwritten."""

    @property
    def url(self) -> str: ...

    def put_record(self, record: Record) -> bool: ...
    def get_record(self, key: str) -> Record | None: ...
    def has_record(self, key: str) -> bool: ...
    def records(self) -> Mapping[str, Record]: ...

    def put_artifact(self, key: str, name: str, data: bytes) -> str: ...
    def get_artifact(self, record: Record, name: str) -> bytes: ...

    def put_blob(self, data: bytes) -> str: ...
    def get_blob(self, digest: str) -> bytes: ...

    def put_task(self, task: Task) -> None: ...
    def get_task(self, key: str) -> Task: ...

    def put_progress(self, key: str, name: str, data: bytes) -> None: ...
    def get_progress(self, key: str, name: str) -> bytes | None: ...
    def clear_progress(self, key: str) -> None: ...

    def put_derived(self, key: str, name: str, data: bytes) -> None: ...
    def get_derived(self, key: str, name: str) -> bytes | None: ...

    def put_failure(self, record: Record) -> None: ...
    def get_failure(self, key: str) -> Record | None: ...

    def task_lock(self, key: str) -> AbstractContextManager[None]: ...
    def lease(self, sweep: str) -> AbstractContextManager[None]: ...
    def sweep_folder(self, sweep: str) -> Path: ...


def open_store(url: str | os.PathLike[str]) -> FolderStore:
    """Open the store at `url`, a folder that every worker can reach (created if absent).

    Raises:
        StoreError: a URL of a kind that is not supported, or a path that is no writable folder.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "file":
        raise StoreError(
            f"storage {text!r}: {scheme}:// is not supported yet; use a folder that every worker "
            "can reach, such as ./.dipgo or a path on a shared file system"
        )
    return FolderStore(Path(rest if separator else text))


class FolderStore:
    """A store in a local or shared folder (NFS); see docs/architecture.md for its layout."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder).expanduser().absolute()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"storage {str(self.folder)!r} cannot be used as a folder ({error.strerror}); "
                "set `storage` to a folder that you may write to"
            ) from error

    @property
    def url(self) -> str:
        return str(self.folder)

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
        won = _link_new(self._path("records", record.key), _sealed(record.to_json()))
        self._path("failures", record.key).unlink(missing_ok=True)
        self.clear_progress(record.key)
        return won

    def get_record(self, key: str) -> Record | None:
        """Return the record of a key, None if there is none.

        Raises:
            StoreError: the file is torn or was edited.
        """
        return _read_record(self._path("records", key))

    def has_record(self, key: str) -> bool:
        return self._path("records", key).exists()

    def records(self) -> Mapping[str, Record]:
        """Return a live view of all records; each file is read when asked for, and only once."""
        return _StoredRecords(self)

    def record_keys(self) -> Iterator[str]:
        folder = self.folder / "records"
        names = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
        return iter(name for name in names if _KEY.fullmatch(name))

    def put_artifact(self, key: str, name: str, data: bytes) -> str:
        """Write one file of a task and return its SHA-256, which belongs into the record."""
        _replace(self._file("artifacts", key, name), data, durable=True)
        return hashlib.sha256(data).hexdigest()

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
        path = self._file("artifacts", record.key, name)
        remedy = f"delete {self._path('records', record.key)} and run again"
        return _read_verified(path, record.artifacts[name], remedy)

    def put_blob(self, data: bytes) -> str:
        """Keep an input under its SHA-256, which is returned."""
        digest = hashlib.sha256(data).hexdigest()
        path = self.folder / "blobs" / digest
        if not path.exists():
            _replace(path, data)
        return digest

    def get_blob(self, digest: str) -> bytes:
        _check(_KEY, digest, "a blob's digest")
        path = self.folder / "blobs" / digest
        return _read_verified(path, digest, f"delete {path} and run the sweep again")

    def put_task(self, task: Task) -> None:
        """Keep the specification, so that a worker needs only the key; the latest options count."""
        path, data = self._path("tasks", task.key), json.dumps(task.to_json(), sort_keys=True)
        if not path.exists() or path.read_text(encoding="utf-8") != data:
            _replace(path, data.encode())

    def get_task(self, key: str) -> Task:
        path = self._path("tasks", key)
        remedy = f"delete {path} and run the sweep again"
        data = _read_json(path, remedy)
        if data is None:
            raise StoreError(f"no task specification at {path}; run the sweep again to write it")
        try:
            task = Task.from_json(data)
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path} is not a task specification ({error}); {remedy}") from error
        if task.key != key:
            raise StoreError(f"{path} was edited: its inputs have another key; {remedy}")
        return task

    def put_progress(self, key: str, name: str, data: bytes) -> None:
        """Keep the state of an unfinished task (a search's checkpoint, a shard of images)."""
        _replace(self._file("progress", key, name), data)

    def get_progress(self, key: str, name: str) -> bytes | None:
        path = self._file("progress", key, name)
        return path.read_bytes() if path.exists() else None

    def clear_progress(self, key: str) -> None:
        shutil.rmtree(self._path("progress", key).with_suffix(""), ignore_errors=True)

    def put_derived(self, key: str, name: str, data: bytes) -> None:
        """Keep what follows from a record alone, but takes long; it may be deleted at any time."""
        _replace(self._file("derived", key, name), data)

    def get_derived(self, key: str, name: str) -> bytes | None:
        path = self._file("derived", key, name)
        return path.read_bytes() if path.exists() else None

    def put_failure(self, record: Record) -> None:
        """Keep the last failure of a task; `error` of the record says what happened."""
        _replace(self._path("failures", record.key), _sealed(record.to_json()))

    def get_failure(self, key: str) -> Record | None:
        return _read_record(self._path("failures", key))

    @contextmanager
    def task_lock(self, key: str) -> Iterator[None]:
        """Wait until no other process works on this task, and keep others out meanwhile."""
        _check(_KEY, key, "a task key")
        path = self.folder / "locks" / f"{key}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path):
            yield
            path.unlink(missing_ok=True)

    @contextmanager
    def lease(self, sweep: str) -> Iterator[None]:
        """Hold the sweep for this driver; the lease of a driver that died is free.

        Raises:
            StoreError: another driver runs this sweep; the message says which.
        """
        folder = self.sweep_folder(sweep)
        lock = FileLock(folder / "lease.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"sweep {sweep!r} in {self.folder} is being run by {_holder(folder)}; wait for it, "
                "or stop that process and run again (nothing finished is lost)"
            ) from error
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.time()}
            _replace(folder / "lease.json", json.dumps(holder).encode())
            yield
        finally:
            (folder / "lease.json").unlink(missing_ok=True)
            lock.release()

    def sweep_folder(self, sweep: str) -> Path:
        """Return the folder of a sweep's lease, resolved file and report (created if absent)."""
        _check(_FILE, sweep, "a sweep's name")
        folder = self.folder / "sweeps" / sweep
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _path(self, room: str, key: str) -> Path:
        _check(_KEY, key, "a task key")
        return self.folder / room / f"{key}.json"

    def _file(self, room: str, key: str, name: str) -> Path:
        _check(_KEY, key, "a task key")
        _check(_FILE, name, "a file name")
        return self.folder / room / key / name


class _StoredRecords(Mapping[str, Record]):
    """All records of a folder, read lazily."""

    def __init__(self, store: FolderStore) -> None:
        self._store = store
        self._read: dict[str, Record] = {}

    def __getitem__(self, key: str) -> Record:
        if key not in self._read:
            record = self._store.get_record(key) if _KEY.fullmatch(key) else None
            if record is None:
                raise KeyError(key)
            self._read[key] = record
        return self._read[key]

    def __iter__(self) -> Iterator[str]:
        return self._store.record_keys()

    def __len__(self) -> int:
        return sum(1 for _ in self._store.record_keys())


def _check(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.fullmatch(text):
        raise StoreError(f"{text!r} is not {what} (it must match {pattern.pattern})")


def _sealed(document: Mapping[str, Any]) -> bytes:
    """Return the document as JSON with a digest of itself, by which edits are noticed."""
    try:
        text = json.dumps({**document, "sha256": content_key(document)}, indent=1, allow_nan=False)
    except ValueError as error:
        raise StoreError(
            f"the record of {document.get('kind')} task {str(document.get('key'))[:12]} cannot be "
            f"stored: {error}; figures without a finite value are stored as null"
        ) from error
    return text.encode()


def _read_record(path: Path) -> Record | None:
    remedy = f"delete {path} and run again, only this task is computed anew"
    data = _read_json(path, remedy)
    if data is None:
        return None
    digest = data.pop("sha256", None)
    try:
        record = Record.from_json(data)
        intact = content_key(data) == digest and record.key == path.stem
    except (TypeError, ValueError) as error:
        raise StoreError(f"{path} is not a record ({error}); {remedy}") from error
    if not intact:
        raise StoreError(f"{path} was edited after it was written; {remedy}")
    return record


def _read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is torn: not JSON ({error}); {remedy}") from error
    if not isinstance(data, dict):
        raise StoreError(f"{path} is not a JSON object; {remedy}")
    return data


def _read_verified(path: Path, digest: str, remedy: str) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(f"{path} is missing; {remedy}") from error
    if hashlib.sha256(data).hexdigest() != digest:
        raise StoreError(f"{path} is not what was written (its SHA-256 differs); {remedy}")
    return data


def _holder(folder: Path) -> str:
    try:
        data = json.loads((folder / "lease.json").read_text(encoding="utf-8"))
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(data["since"]))
        return f"process {data['pid']} on {data['host']} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _temporary(path: Path, data: bytes, *, durable: bool) -> Path:
    """Write `data` beside `path`; durable: on disk, not only in memory, before this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    with temporary.open("xb") as file:
        file.write(data)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    return temporary


def _replace(path: Path, data: bytes, *, durable: bool = False) -> None:
    _temporary(path, data, durable=durable).replace(path)


def _link_new(path: Path, data: bytes) -> bool:
    """Write `path` only if it does not exist; return whether it was written."""
    if path.exists():
        return False
    temporary = _temporary(path, data, durable=True)
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True
