"""Backend: what a storage must be able to do to hold a store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Entry:
    """One object of a storage. modified: seconds since the epoch, by the storage's clock."""

    name: str
    size: int
    modified: float


class Backend(Protocol):
    """Named bytes, each old or new and never a mix, whatever dies while they are written.

    Names are checked (`names.check_name`). What cannot be done raises StoreError, which says what
    to do about it.
    """

    @property
    def url(self) -> str:
        """Return what `open_store` opens the same storage with."""

    @property
    def folder(self) -> Path | None:
        """Return the folder that the objects lie in as files, if there is one."""

    def place(self, name: str) -> str:
        """Return where an object lies, for people."""

    def get(self, name: str) -> bytes | None: ...

    def exists(self, name: str) -> bool: ...

    def put(self, name: str, data: bytes, *, durable: bool = False) -> None:
        """Write an object, new or again; durable: it outlives the machine once this returns."""

    def put_if_absent(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        """Write an object unless there is one; return whether this call wrote it."""

    def list(self, prefix: str) -> Iterator[str]:
        """Return the names of all objects under ``prefix/``, sorted."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Return the same with size and time; an empty prefix means everything."""

    def leftovers(self, older_than_s: float) -> Iterator[Entry]:
        """Return what writers that died left behind, objects of no name of a store."""

    def delete(self, name: str) -> None:
        """Delete an object if it is there."""

    def delete_all(self, prefix: str) -> None:
        """Delete all objects under ``prefix/``."""

    def delete_leftover(self, entry: Entry) -> None: ...
