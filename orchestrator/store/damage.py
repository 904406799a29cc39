"""Everything a store holds read and checked; what is damaged can be set aside to be made again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from dipgo_core.errors import StoreError
from orchestrator.records import Record
from orchestrator.store.holdings import key_of
from orchestrator.store.names import is_key
from orchestrator.store.store import Store, artifact_name

#: Where what is damaged goes.
ASIDE = "damaged"


@dataclass(frozen=True)
class Damage:
    """One thing that is not what was written. objects: what goes aside to mend it."""

    problem: str
    objects: tuple[str, ...]


def find_damage(store: Store) -> Iterator[Damage]:
    """Read everything and yield what is damaged: records, their artifacts, inputs, tasks."""
    resting = dict[str, list[str]]()
    readable = list[str]()
    for key in store.records():
        problem = _problem(partial(_note, store, key, readable, resting))
        if problem is not None:
            yield Damage(problem, (_record_name(key),))
    whole = set(readable)
    for shard, references in resting.items():
        if shard not in whole:
            problem = f"the dense run {references[0][:12]} lacks its shard {shard[:12]}"
            yield Damage(problem, tuple(map(_record_name, references)))
    for key in readable:
        record = store.get_record(key)
        if record is not None:
            yield from _damaged_artifacts(store, record, resting)
    yield from _unreadable(store, "blobs", lambda name: store.get_blob(name.partition("/")[2]))
    yield from _unreadable(store, "tasks", lambda name: store.get_task(key_of(name)))
    yield from _unreadable(store, "failures", lambda name: store.get_failure(key_of(name)))


def set_aside(store: Store, damage: Damage) -> None:
    """Move what is damaged under ``damaged/``, so that the next run makes it again."""
    for name in damage.objects:
        data = store.backend.get(name)
        if data is not None:
            store.backend.put(f"{ASIDE}/{name}", data, durable=True)
            store.backend.delete(name)


def _note(store: Store, key: str, readable: list[str], resting: dict[str, list[str]]) -> None:
    """Read a record; note which shards are read whenever it is used, if it is a reference."""
    record = store.get_record(key)
    if record is None:
        return
    readable.append(key)
    if record.kind == "reference":
        for shard in record.outputs.get("shards", ()):
            resting.setdefault(shard, []).append(key)


def _damaged_artifacts(
    store: Store, record: Record, resting: Mapping[str, list[str]]
) -> Iterator[Damage]:
    """Yield artifacts that are missing or differ; the task is done again, hence its record goes."""
    for name, digest in record.artifacts.items():
        problem = _problem(partial(store.get_artifact, record, name))
        if problem is not None:
            file = artifact_name(record.key, name, digest)
            rest = resting.get(record.key, ())
            yield Damage(problem, (_record_name(record.key), *map(_record_name, rest), file))


def _unreadable(store: Store, room: str, read: Callable[[str], object]) -> Iterator[Damage]:
    for name in store.backend.list(room):
        if is_key(key_of(name)):
            problem = _problem(partial(read, name))
            if problem is not None:
                yield Damage(problem, (name,))


def _problem(read: Callable[[], object]) -> str | None:
    try:
        read()
    except StoreError as error:
        return str(error)
    return None


def _record_name(key: str) -> str:
    return f"records/{key}.json"
