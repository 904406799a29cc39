"""What was acknowledged against what is kept: nothing lost, nothing twice, the same figures.

Read without the code under test where that is possible: records as JSON files, MLflow by SQL.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

#: Figures of a disturbed run may differ by this much, relatively. Images and searches come from
#: seeds and one library on one machine, so they are equal to the last bit wherever a task ran; the
#: room is for another number of threads, which adds float32 numbers in another order.
TOLERANCE = 1e-5
#: What says how long, where or in how much memory something ran, not what came out.
OF_THE_RUN = re.compile(
    r"seconds|finished|span|pid|node|host|.*_ms|images_per_second|peak_memory_bytes"
)
_DONE = re.compile(r"^ *[\d.]+ s \[\d+/\d+\] done (?P<label>.*)$", re.MULTILINE)


def records_in(storage: Path) -> dict[str, dict[str, Any]]:
    """Return every record; a torn one is an error."""
    found = {}
    for path in sorted((storage / "records").glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert record["key"] == path.stem and record["state"] == "done", path
        found[path.stem] = record
    return found


def labels_in(storage: Path) -> dict[str, str]:
    """Return the key of each label that a task was handed out under."""
    tasks = [json.loads(p.read_text("utf-8")) for p in (storage / "tasks").glob("*.json")]
    return {task["label"]: task["key"] for task in tasks}


def acknowledged(stderr: str, storage: Path) -> list[str]:
    """Return the keys of the tasks that a run said were done, in order, as often as it said so."""
    labels = labels_in(storage)
    return [labels[found["label"]] for found in _DONE.finditer(stderr)]


def check_store(storage: Path, acks: Iterable[str]) -> None:
    """Check that what was acknowledged is there, and was acknowledged once over all runs."""
    records, counts = records_in(storage), Counter(acks)
    lost = [key[:12] for key in counts if key not in records]
    assert not lost, f"acknowledged, but not in the store: {lost}"
    twice = [_told(records[key]) for key, count in counts.items() if count > 1]
    assert not twice, f"acknowledged more than once: {twice}"
    torn = [path for path in storage.rglob("*.tmp") if path.stat().st_size == 0]
    assert len(torn) < 20, f"temporary files pile up: {torn}"


def check_artifacts(storage: Path) -> None:
    """Check that every record's artifacts are whole (independent of the store: hashlib)."""
    for key, record in records_in(storage).items():
        for name, digest in record["artifacts"].items():
            files = (storage / "artifacts" / key).glob(f"*{name}")
            whole = [hashlib.sha256(path.read_bytes()).hexdigest() == digest for path in files]
            assert any(whole), f"{key[:12]}/{name} is missing or damaged"


def check_equal(found: Path, expected: Path, *, tolerance: float = TOLERANCE) -> None:
    """Check that two stores hold the same records, up to times and hosts, within the tolerance."""
    ours, theirs = records_in(found), records_in(expected)
    assert ours.keys() == theirs.keys(), {
        "missing": [_told(theirs[key]) for key in theirs.keys() - ours.keys()],
        "more": [_told(ours[key]) for key in ours.keys() - theirs.keys()],
    }
    for key, record in ours.items():
        place = _first_difference(record["outputs"], theirs[key]["outputs"], tolerance)
        assert place is None, f"{_told(record)} differs at {place}"


def _told(record: Mapping[str, Any]) -> str:
    return f"{record['kind']} {record['key'][:12]}"


def _first_difference(a: Any, b: Any, tolerance: float, place: str = "outputs") -> str | None:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        if a.keys() != b.keys():
            return f"{place}: {sorted(a)} against {sorted(b)}"
        pairs = [(f"{place}.{name}", a[name], b[name]) for name in a if not OF_THE_RUN.match(name)]
    elif isinstance(a, list) and isinstance(b, list):
        if len(a) != len(b):
            return f"{place}: {len(a)} against {len(b)} values"
        pairs = [(f"{place}[{i}]", *both) for i, both in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, float) and isinstance(b, float | int):
        same = math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)
        return None if same else f"{place}: {a} against {b}"
    else:
        return None if a == b else f"{place}: {a!r} against {b!r}"
    found = (_first_difference(x, y, tolerance, name) for name, x, y in pairs)
    return next((each for each in found if each is not None), None)


def mlflow_runs(database: Path) -> dict[str, list[str]]:
    """Return the states of the live runs of each task key."""
    query = (
        "SELECT tags.value, runs.status FROM runs JOIN tags ON tags.run_uuid = runs.run_uuid "
        "WHERE tags.key = 'dipgo.task_key' AND runs.lifecycle_stage = 'active'"
    )
    found: dict[str, list[str]] = {}
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        for key, status in connection.execute(query):
            found.setdefault(key, []).append(status)
    return found


def check_mlflow(database: Path, wanted: Iterable[str]) -> None:
    """Check that each wanted key has one finished run, and that no key has two."""
    runs = mlflow_runs(database)
    lost = sorted(key[:12] for key in set(wanted) - runs.keys())
    twice = {key[:12]: states for key, states in runs.items() if len(states) > 1}
    open_runs = {key[:12]: states for key, states in runs.items() if "RUNNING" in states}
    assert not lost, f"not in MLflow: {lost}"
    assert not twice, f"more than one run of a key: {twice}"
    assert not open_runs, f"left running: {open_runs}"
