"""What the `cache` commands do and print."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dipgo_core.errors import ConfigError, StoreError
from orchestrator.cli.show import megabytes, print_json, print_table, say
from orchestrator.driver import plan_sweep
from orchestrator.planned import Plan
from orchestrator.records import Record, content_key
from orchestrator.store import Store, open_store
from orchestrator.store.damage import ASIDE, find_damage, set_aside
from orchestrator.store.garbage import Garbage, find_garbage, remove
from orchestrator.store.holdings import Holding, holdings
from orchestrator.sweep_file import load_sweep

DEFAULT = "./.dipgo"
DAY_S = 86400


def opened(file: Path | None, overrides: Sequence[str], storage: str | None) -> Store:
    """Return the store of a sweep file, or at a URL."""
    if file is not None and storage is not None:
        raise ConfigError(f"give {file} or --storage {storage}, not both (-o storage=… changes it)")
    if file is not None:
        return open_store(load_sweep(file, overrides).storage)
    if storage is None and not Path(DEFAULT).is_dir():
        raise ConfigError(f"there is no store at {DEFAULT}: give a sweep file, or --storage URL")
    return open_store(storage or DEFAULT)


def show_holdings(store: Store, *, as_json: bool) -> None:
    """Print what a store holds."""
    found = holdings(store)
    if as_json:
        total = {"objects": sum(h.objects for h in found), "size": sum(h.size for h in found)}
        print_json({"storage": store.url, "held": [asdict(each) for each in found], **total})
        return
    rows = [_row(each) for each in found]
    print_table(store.url, ("room", "of", "objects", "MB", "oldest", "newest"), rows)
    say(f"{megabytes(sum(each.size for each in found))} MB in all")


def collect_and_show(
    files: Sequence[Path],
    overrides: Sequence[str],
    storage: str | None,
    *,
    shards: bool,
    unneeded: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Remove the garbage of a store, or list it.

    Raises:
        ConfigError: the files are of several storages, or `unneeded` names none.
        StoreError: a sweep is being run.
    """
    store = opened(files[0] if files else None, overrides, storage)
    if unneeded and not files:
        raise ConfigError("--unneeded keeps what the sweep files named need: name at least one")
    found = list[Garbage]()
    with nullcontext() if dry_run else store.cleaning() as lease:
        needed = _needed(store, files, overrides) if unneeded else None
        for garbage in list(find_garbage(store, shards=shards, needed=needed)):
            if lease is not None:
                lease.check()
                remove(store, garbage)
            found.append(garbage)
    _show_garbage(store, found, dry_run=dry_run, as_json=as_json)


def verify_and_show(store: Store, *, repair: bool, as_json: bool) -> None:
    """Print what is damaged in a store, and set it aside if asked to.

    Raises:
        StoreError: something is damaged, and nothing was done about it.
    """
    with store.cleaning() if repair else nullcontext() as lease:
        found = list(find_damage(store))
        for damage in found:
            if lease is not None:
                lease.check()
                set_aside(store, damage)
    if as_json:
        listed = [asdict(damage) for damage in found]
        print_json({"storage": store.url, "damaged": listed, "repaired": repair})
    else:
        for damage in found:
            say(damage.problem)
    if found and not repair:
        raise StoreError(
            f"{len(found)} damaged in {store.url}; --repair moves them to {ASIDE}/, and the next "
            "run makes them again"
        )
    if not as_json:
        done = f"{len(found)} moved to {store.url}/{ASIDE}, run the sweep again" if found else None
        say(done or f"{store.url}: everything is what was written")


def _needed(store: Store, files: Sequence[Path], overrides: Sequence[str]) -> frozenset[str]:
    """Return the keys of all tasks that the sweeps need.

    Raises:
        ConfigError: one of them has another storage.
    """
    needed = frozenset[str]()
    for file in files:
        sweep = load_sweep(file, overrides)
        if open_store(sweep.storage).url != store.url:
            raise ConfigError(f"{file} has storage {sweep.storage}, not {store.url}: one at a time")
        needed |= needed_keys(store, plan_sweep(sweep, store))
    return needed


def needed_keys(store: Store, plan: Plan) -> frozenset[str]:
    """Return the keys of a plan's tasks, of what they need, and of the shards references read.

    The same latencies on other devices count as well. Until the plan is complete the shards of its
    evaluations do, too: the next rung of a race begins with them.
    """
    keys = {key for task in plan.tasks for key in (task.key, *task.needs)}
    records = store.records()
    found = [records[key] for key in keys if key in records]
    shards = {shard for record in found for shard in record.outputs.get("shards", ())}
    if not plan.complete:
        shards |= _evaluated_shards(store, plan)
    return frozenset((*keys, *shards, *_on_any_device(records, plan)))


def _evaluated_shards(store: Store, plan: Plan) -> set[str]:
    keys = [planned.key for planned in plan.tasks if planned.kind == "evaluate"]
    tasks = (store.get_task(key) for key in keys if store.has_task(key))
    return {shard for task in tasks for shard in task.options.get("shards", ())}


def _on_any_device(records: Mapping[str, Record], plan: Plan) -> Iterator[str]:
    """Yield the latencies that differ from those of the plan in the device alone."""
    wanted = {
        _but_device(planned.task.inputs)
        for planned in plan.tasks
        if planned.kind == "latency" and planned.task is not None
    }
    if wanted:
        timed = (record for record in records.values() if record.kind == "latency")
        yield from (record.key for record in timed if _but_device(record.inputs) in wanted)


def _but_device(inputs: Mapping[str, Any]) -> str:
    return content_key({name: value for name, value in inputs.items() if name != "device"})


def _show_garbage(store: Store, found: Sequence[Garbage], *, dry_run: bool, as_json: bool) -> None:
    if as_json:
        listed = [{**asdict(each.entry), "reason": each.reason} for each in found]
        print_json({"storage": store.url, "garbage": listed, "removed": not dry_run})
        return
    counts, sizes = Counter[str](), Counter[str]()
    for each in found:
        counts[each.reason] += 1
        sizes[each.reason] += each.entry.size
    rows = [(reason, str(count), megabytes(sizes[reason])) for reason, count in counts.items()]
    if rows:
        print_table(store.url, ("why", "objects", "MB"), rows)
    verb = "would be removed" if dry_run else "removed"
    say(f"{len(found)} objects, {megabytes(sum(sizes.values()))} MB {verb}")


def _row(held: Holding) -> tuple[str, ...]:
    ages = (_age(held.oldest), _age(held.newest))
    return held.room, held.kind, str(held.objects), megabytes(held.size), *ages


def _age(since: float) -> str:
    seconds = max(0.0, time.time() - since)
    if seconds < DAY_S:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / DAY_S:.0f} d"
