"""FolderBackend: a store in a folder, local or shared (NFS)."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from dipgo_core.errors import StorageError, StoreError
from orchestrator.store import disk
from orchestrator.store.backend import Entry
from orchestrator.store.names import check_name

T = TypeVar("T")

_TRIES = 5
#: What no waiting mends: somebody has to set `storage`, rights or mounts right.
_LASTING = frozenset(
    {errno.EROFS, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTSUP, errno.ENOTDIR}
    | {errno.EISDIR, errno.ENAMETOOLONG}
)
_ADVICE = {
    errno.ENOSPC: "free some space there and run again: nothing finished is lost",
    errno.EDQUOT: "free some of the quota there and run again: nothing finished is lost",
    errno.EROFS: "the file system is mounted read-only; mount it writable and run again",
    errno.EACCES: "set `storage` to a folder that you may write to",
    errno.ELOOP: "it is a symbolic link; put the file or folder itself there",
    errno.EPERM: "the file system must allow hard links: they make a record appear whole and once",
    errno.ENOTSUP: "the file system must have hard links: they make a record appear whole and once",
}


class FolderBackend:
    """Files in a folder. Links inside that lead out of it are refused; itself may be one."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self._folder = Path(folder).expanduser().absolute()
        try:
            disk.make_folder(self._folder, durable=True)
        except OSError as error:
            raise StoreError(
                f"storage {str(self._folder)!r} cannot be used as a folder ({error.strerror}); "
                "set `storage` to a folder that you may write to"
            ) from error

    @property
    def url(self) -> str:
        return str(self._folder)

    @property
    def folder(self) -> Path:
        return self._folder

    def place(self, name: str) -> str:
        return str(self._folder.joinpath(*check_name(name)))

    def get(self, name: str) -> bytes | None:
        path = self._path(name)
        with _told(path, "read"):
            try:
                return disk.read(path)
            except OSError as error:
                if error.errno != errno.ESTALE:  # replaced on the server of NFS meanwhile
                    raise
                return disk.read(path)

    def exists(self, name: str) -> bool:
        path = self._path(name)
        with _told(path, "read"):
            return disk.exists(path)

    def put(self, name: str, data: bytes, *, durable: bool = False) -> None:
        path = self._path(name)
        with _told(path, "written"):
            _while_folders_vanish(lambda: disk.replace(path, data, durable=durable))

    def put_if_absent(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        path = self._path(name)
        with _told(path, "written"):
            return _while_folders_vanish(lambda: disk.link_new(path, data, durable=durable))

    def list(self, prefix: str) -> Iterator[str]:
        top = self._room(prefix)
        for path in self._files(top):
            if not path.name.startswith("."):
                yield path.relative_to(self._folder).as_posix()

    def entries(self, prefix: str) -> Iterator[Entry]:
        top = self._room(prefix) if prefix else self._folder
        for path in self._files(top):
            if not path.name.startswith("."):
                yield from self._entry(path)

    def leftovers(self, older_than_s: float) -> Iterator[Entry]:
        for path in self._files(self._folder):
            if path.name.startswith(".") and path.name.endswith(disk.TEMPORARY):
                for entry in self._entry(path):
                    if time.time() - entry.modified > older_than_s:
                        yield entry

    def delete(self, name: str) -> None:
        path = self._path(name)
        with _told(path, "deleted"):
            disk.remove(path)

    def delete_all(self, prefix: str) -> None:
        top = self._room(prefix)
        with _told(top, "deleted"):
            try:
                disk.remove_folder(top)
            except OSError as error:  # never there, or others delete or write there as well
                if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
                    raise

    def delete_leftover(self, entry: Entry) -> None:
        path = self._folder / entry.name
        with _told(path, "deleted"):
            disk.remove(path)

    def _path(self, name: str) -> Path:
        """Return the path of an object, which may be a link itself: it is not followed."""
        path = self._folder.joinpath(*check_name(name))
        self._check_inside(path, path.parent)
        return path

    def _room(self, prefix: str) -> Path:
        """Return the path of a folder of objects, which may be no link that leads away."""
        path = self._folder.joinpath(*check_name(prefix))
        self._check_inside(path, path)
        return path

    def _check_inside(self, path: Path, followed: Path) -> None:
        root, real = os.path.realpath(self._folder), os.path.realpath(followed)
        if os.path.commonpath([root, real]) != root:
            raise StoreError(
                f"{path} lies outside the storage: a symbolic link leads to {real}; put the "
                "folder itself there, or set `storage` to where everything lies"
            )

    def _files(self, top: Path) -> Iterator[Path]:
        """Return the files below a folder, sorted; folders that are links are not entered."""
        with _told(top, "listed"):
            try:
                with os.scandir(top) as found:
                    listed = [(e.name, e.is_dir(follow_symlinks=False)) for e in found]
            except (FileNotFoundError, NotADirectoryError):
                return
        for name, is_folder in sorted(listed):
            if is_folder:
                yield from self._files(top / name)
            else:
                yield top / name

    def _entry(self, path: Path) -> Iterator[Entry]:
        """Return the entry of a file, nothing if it is gone."""
        try:
            found = path.lstat()
        except FileNotFoundError:
            return
        yield Entry(path.relative_to(self._folder).as_posix(), found.st_size, found.st_mtime)


def _while_folders_vanish(write: Callable[[], T]) -> T:
    """Write again if somebody deleted the folder (`delete_all`) between two steps of writing."""
    for _ in range(_TRIES - 1):
        with suppress(FileNotFoundError):
            return write()
    return write()


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    """Turn errors of the disk into one that names file, reason and next move."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        advice = _ADVICE.get(error.errno or 0, "see that the storage is reachable, and run again")
        kind = StoreError if error.errno in _LASTING else StorageError
        raise kind(f"{path} cannot be {what} ({reason}): {advice}") from error
