"""What the store does to a disk: each call leaves old or new, and never a mix."""

from __future__ import annotations

import errno
import os
import uuid
from contextlib import suppress
from pathlib import Path

TEMPORARY = ".tmp"


def replace(path: Path, data: bytes, *, durable: bool) -> None:
    """Write a file, new or again; durable: on disk, with its name, before this returns."""
    temporary = _temporary(path, data, durable=durable)
    try:
        os.replace(temporary, path)
    except OSError:
        _forget(temporary)
        raise
    if durable:
        sync_folder(path.parent)


def link_new(path: Path, data: bytes, *, durable: bool) -> bool:
    """Write a file only if it does not exist; return whether it was written.

    link(2) is atomic on NFS too, but its answer may be lost and the call repeated by the client:
    then it fails although the link is there, which the number of links of the temporary tells.
    """
    if os.path.lexists(path):
        if durable:
            sync_folder(path.parent)  # whoever wrote it may not have come to this
        return False
    temporary = _temporary(path, data, durable=durable)
    try:
        os.link(temporary, path)
        won = True
    except FileExistsError:
        won = os.stat(temporary).st_nlink == 2
    finally:
        _forget(temporary)
    if durable:
        sync_folder(path.parent)
    return won


def make_folder(folder: Path, *, durable: bool) -> None:
    """Create a folder and those above it, which are always on disk before this returns: they are
    few, and durable files come into them later."""
    if folder.is_dir():
        return
    make_folder(folder.parent, durable=True)
    try:
        os.mkdir(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    if durable:
        sync_folder(folder.parent)


def exists(path: Path) -> bool:
    """Return whether there is a file; a disk that does not answer is an error, not a no."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def remove_folder(folder: Path) -> None:
    """Remove a folder with all files below it; links are not followed."""
    with os.scandir(folder) as found:
        listed = [(Path(each.path), each.is_dir(follow_symlinks=False)) for each in found]
    for path, is_folder in listed:
        if is_folder:
            remove_folder(path)
        else:
            remove(path)
    os.rmdir(folder)


def remove(path: Path) -> None:
    """Remove a file if it is there."""
    with suppress(FileNotFoundError):
        os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that sync by themselves
            raise
    finally:
        os.close(handle)


def read(path: Path) -> bytes | None:
    """Return the content of a file, None if there is none; the file may not be a link."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(handle, "rb") as file:
        return file.read()


def _temporary(path: Path, data: bytes, *, durable: bool) -> Path:
    """Write a file beside `path`, in a folder that is created if it is not there."""
    make_folder(path.parent, durable=durable)
    temporary = path.with_name(f".{uuid.uuid4().hex}{TEMPORARY}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    handle = os.open(temporary, flags, 0o666)
    try:
        try:
            _write(handle, data)
            if durable:
                os.fsync(handle)
        finally:
            os.close(handle)  # where a network file system may tell that its disk is full
    except OSError:
        _forget(temporary)
        raise
    return temporary


def _write(handle: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


def _forget(temporary: Path) -> None:
    with suppress(OSError):  # it is collected later
        os.unlink(temporary)
