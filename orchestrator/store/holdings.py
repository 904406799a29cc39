"""What a store holds, by kind, sweep, size and age."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dipgo_core.errors import StoreError
from orchestrator.records import Record
from orchestrator.store.backend import Entry
from orchestrator.store.store import Store

#: Rooms whose objects belong to one task, with its key as the second part of the name.
OF_TASKS = ("records", "artifacts", "derived", "tasks", "failures", "progress", "claims")


@dataclass(frozen=True)
class Holding:
    """Objects of one kind. kind: of the task for what belongs to one, else of the sweep, or "".

    oldest, newest: seconds since the epoch, by the storage's clock.
    """

    room: str
    kind: str
    objects: int
    size: int
    oldest: float
    newest: float


def holdings(store: Store) -> tuple[Holding, ...]:
    """Return what the store holds, by room and kind; every record is read for its kind."""
    kinds = kinds_of(store)
    found: dict[tuple[str, str], Holding] = {}
    for entry in store.backend.entries(""):
        place = _place(entry, kinds)
        found[place] = _with(found.get(place), entry, place)
    return tuple(found[place] for place in sorted(found))


def kinds_of(store: Store) -> dict[str, str]:
    """Return the kind of each task that has a record; "damaged" where that cannot be read."""
    records = store.records()
    return {key: _kind(records, key) for key in records}


def key_of(name: str) -> str:
    """Return the key of the task that an object belongs to."""
    return name.split("/")[1].removesuffix(".json")


def _kind(records: Mapping[str, Record], key: str) -> str:
    try:
        return records[key].kind
    except (StoreError, KeyError):
        return "damaged"


def _place(entry: Entry, kinds: Mapping[str, str]) -> tuple[str, str]:
    room, _, rest = entry.name.partition("/")
    if room in OF_TASKS:
        return room, kinds.get(key_of(entry.name), "unfinished")
    return room, rest.partition("/")[0] if room == "sweeps" else ""


def _with(holding: Holding | None, entry: Entry, place: tuple[str, str]) -> Holding:
    if holding is None:
        return Holding(*place, 1, entry.size, entry.modified, entry.modified)
    return Holding(
        *place,
        holding.objects + 1,
        holding.size + entry.size,
        min(holding.oldest, entry.modified),
        max(holding.newest, entry.modified),
    )
