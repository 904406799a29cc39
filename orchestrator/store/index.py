"""RecordIndex: all records of a store; one listing tells which there are, each is read when asked.

A listing is fast (10,000 names), questions about single names are not (NFS, S3). So what other
processes add is seen after `refresh` or `add`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from threading import RLock

from orchestrator.records import Record

#: Bytes of JSON whose records stay in memory; as Python objects they take several times as much.
KEPT_BYTES = 16 * 2**20

#: What reads a record: its key -> the record and the bytes it was read from, None if there is none.
Read = Callable[[str], tuple[Record, int] | None]


class RecordIndex(Mapping[str, Record]):
    """A view of the records by key. Threads may share it."""

    def __init__(self, listing: Callable[[], Iterable[str]], read: Read) -> None:
        self._listing = listing
        self._read = read
        self._lock = RLock()
        self._keys: dict[str, None] = {}
        self._kept: OrderedDict[str, tuple[Record, int]] = OrderedDict()
        self._kept_bytes = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again at what is there; records that are gone are forgotten."""
        keys = dict.fromkeys(self._listing())
        with self._lock:
            self._keys = keys
            for key in [key for key in self._kept if key not in keys]:
                self._drop(key)

    def add(self, key: str) -> None:
        """Take note of a record that landed."""
        with self._lock:
            self._keys[key] = None

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        with self._lock:
            return iter(sorted(self._keys))

    def __getitem__(self, key: str) -> Record:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key][0]
            if key not in self._keys:
                raise KeyError(key)
        found = self._read(key)
        if found is None:
            raise KeyError(key)
        self._keep(key, *found)
        return found[0]

    def _keep(self, key: str, record: Record, size: int) -> None:
        with self._lock:
            self._drop(key)
            self._kept[key] = (record, size)
            self._kept_bytes += size
            while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
                self._drop(next(iter(self._kept)))

    def _drop(self, key: str) -> None:
        _, size = self._kept.pop(key, (None, 0))
        self._kept_bytes -= size
