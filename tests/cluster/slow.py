"""A storage that takes its time: every operation waits before it is done."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.store.backend import Backend, Entry


@dataclass(frozen=True)
class SlowBackend:
    """Passes everything on to another backend, `seconds` later."""

    fast: Backend
    seconds: float

    @property
    def url(self) -> str:
        return self.fast.url

    @property
    def folder(self) -> Path | None:
        return self.fast.folder

    def place(self, name: str) -> str:
        return self.fast.place(name)

    def get(self, name: str) -> bytes | None:
        time.sleep(self.seconds)
        return self.fast.get(name)

    def exists(self, name: str) -> bool:
        time.sleep(self.seconds)
        return self.fast.exists(name)

    def put(self, name: str, data: bytes, *, durable: bool = False) -> None:
        time.sleep(self.seconds)
        self.fast.put(name, data, durable=durable)

    def put_if_absent(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        time.sleep(self.seconds)
        return self.fast.put_if_absent(name, data, durable=durable)

    def list(self, prefix: str) -> Iterator[str]:
        time.sleep(self.seconds)
        return self.fast.list(prefix)

    def entries(self, prefix: str) -> Iterator[Entry]:
        time.sleep(self.seconds)
        return self.fast.entries(prefix)

    def leftovers(self, older_than_s: float) -> Iterator[Entry]:
        return self.fast.leftovers(older_than_s)

    def delete(self, name: str) -> None:
        time.sleep(self.seconds)
        self.fast.delete(name)

    def delete_all(self, prefix: str) -> None:
        time.sleep(self.seconds)
        self.fast.delete_all(prefix)

    def delete_leftover(self, entry: Entry) -> None:
        self.fast.delete_leftover(entry)
