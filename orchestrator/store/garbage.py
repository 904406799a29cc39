"""What of a store nobody needs any more, with the reason; nothing that a result rests on."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dipgo_core.errors import StoreError
from orchestrator.records import Record, Task
from orchestrator.store.backend import Entry
from orchestrator.store.holdings import key_of
from orchestrator.store.names import is_key
from orchestrator.store.store import Store, artifact_name

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@dataclass(frozen=True)
class Garbage:
    """Something to remove. leftover: of a writer that died, under no name of a store."""

    entry: Entry
    reason: str
    leftover: bool = False


def find_garbage(
    store: Store, *, shards: bool = False, needed: Collection[str] | None = None
) -> Iterator[Garbage]:
    """Yield what may be removed.

    shards: also the images' scores of gate tables that are evaluated already; evaluating them on
    more images would generate these again. needed: keys of tasks; then also the records of all
    others, with what belongs to them.

    Raises:
        StoreError: `shards`, and a sweep is not finished that may need them.
    """
    for entry in store.backend.leftovers(HOUR_S):
        yield Garbage(entry, "left by a writer that died", leftover=True)
    dropped = _dropped(store, shards, needed)
    done = set(store.records()) - set(dropped)
    for room in ("records", "artifacts", "derived"):
        for entry in store.backend.entries(room):
            if key_of(entry.name) in dropped:
                yield Garbage(entry, dropped[key_of(entry.name)])
    yield from _of_finished(store, done)
    begun = {key_of(name) for name in store.backend.list("progress")}  # it tells of artifacts
    yield from _without_record(store, {*done, *dropped, *begun})
    yield from _not_named(store, done)
    for entry in store.backend.entries("probes"):
        if _age(entry) > DAY_S:
            yield Garbage(entry, "a check of the storage that is over")


def remove(store: Store, garbage: Garbage) -> None:
    """Remove one thing from the store."""
    if garbage.leftover:
        store.backend.delete_leftover(garbage.entry)
    else:
        store.backend.delete(garbage.entry.name)


def _dropped(store: Store, shards: bool, needed: Collection[str] | None) -> dict[str, str]:
    """Return the keys whose records may go as well, with the reason."""
    dropped = dict[str, str]()
    if shards:
        _check_all_ended(store)
        used = used_up_shards(store)
        dropped |= dict.fromkeys(used, "a shard whose evaluation is there")
    if needed is not None:
        others = set(store.records()) - set(needed)
        dropped |= dict.fromkeys(others, "no sweep that was named needs it")
    return dropped


def _check_all_ended(store: Store) -> None:
    """See that no race is open: its next rung takes the images of the last one."""
    for sweep in store.unfinished_sweeps():
        raise StoreError(
            f"sweep {sweep!r} in {store.url} is not finished and may go on with the images of its "
            "shards: run it to its end before `--shards`, or, if it never will be, remove "
            f"{store.sweep_file_place(sweep, 'unfinished.json')}"
        )


def used_up_shards(store: Store) -> frozenset[str]:
    """Return the shards of gate tables that feed evaluations which all have their record.

    Shards of the dense run stay: what is compared with its images needs them for ever.
    """
    records = store.records()
    over, open_ones = set[str](), set[str]()
    for name in store.backend.list("tasks"):
        task = _task(store, key_of(name))
        if task is not None and task.kind == "evaluate":
            (over if task.key in records else open_ones).update(task.options.get("shards", ()))
    found = (_record(store, key) for key in over - open_ones if key in records)
    return frozenset(r.key for r in found if r and r.kind == "images" and "keep" in r.inputs)


def _record(store: Store, key: str) -> Record | None:
    """Return a record, None if it is damaged: of that `verify` tells."""
    try:
        return store.get_record(key)
    except StoreError:
        return None


def _task(store: Store, key: str) -> Task | None:
    try:
        return store.get_task(key)
    except StoreError:
        return None


def _of_finished(store: Store, done: Collection[str]) -> Iterator[Garbage]:
    for room in ("progress", "failures", "claims"):
        for entry in store.backend.entries(room):
            if key_of(entry.name) in done:
                yield Garbage(entry, f"{room} of a task that is done")
    claims = [e for e in store.backend.entries("claims") if key_of(e.name) not in done]
    alive = {key_of(entry.name) for entry in claims if _age(entry) <= DAY_S}
    for entry in claims:
        if key_of(entry.name) not in alive:
            yield Garbage(entry, "a claim that has expired")


def _without_record(store: Store, known: Collection[str]) -> Iterator[Garbage]:
    for room in ("artifacts", "derived"):
        for entry in store.backend.entries(room):
            key = key_of(entry.name)
            if is_key(key) and key not in known and _age(entry) > DAY_S:
                yield Garbage(entry, f"{room} of no record")


def _not_named(store: Store, done: Collection[str]) -> Iterator[Garbage]:
    """Yield artifacts of a task that was done twice, in whose record they are not."""
    named: tuple[str, frozenset[str]] = ("", frozenset())
    for entry in store.backend.entries("artifacts"):
        key = key_of(entry.name)
        if key in done and key != named[0]:
            named = key, _named(store, key)
        if key in done and named[1] and entry.name not in named[1]:
            yield Garbage(entry, "made by a worker that was too late")


def _named(store: Store, key: str) -> frozenset[str]:
    """Return the names of a record's artifacts; none where it is damaged: then all of them stay."""
    record = _record(store, key)
    if record is None:
        return frozenset()
    return frozenset(artifact_name(key, n, digest) for n, digest in record.artifacts.items())


def _age(entry: Entry) -> float:
    return time.time() - entry.modified
