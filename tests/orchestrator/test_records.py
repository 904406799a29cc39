"""Keys and JSON of tasks and records. Oracle for keys: hashlib over hand-written JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from orchestrator.records import Pool, Record, Task, content_key, held_after


def test_content_key_is_the_sha256_of_sorted_compact_json() -> None:
    expected = hashlib.sha256(b'{"a":[1,2.5],"b":null}').hexdigest()
    assert content_key({"b": None, "a": (1, 2.5)}) == expected


@pytest.mark.parametrize(("one", "other"), [(7, 7.0), ((1, 2), [1, 2]), ({"a": 1}, {"a": 1.0})])
def test_content_key_coerces_types(one: Any, other: Any) -> None:
    assert content_key(one) == content_key(other)


@pytest.mark.parametrize(("one", "other"), [(1, True), (1, "1"), (0, None), (0.1, 0.2)])
def test_content_key_tells_values_apart(one: Any, other: Any) -> None:
    assert content_key(one) != content_key(other)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, object()])
def test_content_key_refuses_what_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match="content key"):
        content_key({"field": value})


def test_task_key_depends_on_kind_and_inputs_only() -> None:
    task = Task(kind="search", inputs={"seed": 1})
    same = Task(kind="search", inputs={"seed": 1}, label="x", cpus=4, options={"batch_size": 8})
    assert task.key == same.key
    assert task.key != Task(kind="evaluate", inputs={"seed": 1}).key
    assert task.key != Task(kind="search", inputs={"seed": 2}).key


def test_task_and_record_survive_json() -> None:
    task = Task(kind="search", inputs={"seed": 1}, needs=("a",), options={"n": 1}, exclusive=True)
    record = Record(key=task.key, kind="search", state="done", inputs=task.inputs, outputs={"x": 1})
    assert Task.from_json(json.loads(json.dumps(task.to_json()))) == task
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record


def test_worker_holds_the_pipelines_it_used_last() -> None:
    shared, alone = Pool(), Pool(exclusive=True)
    assert held_after(("a", "b"), "b", shared) == ("b", "a")
    assert held_after(("a", "b"), "c", shared) == ("c", "a")
    assert held_after(("a", "b"), "", shared) == ("a", "b")
    assert held_after(("a",), "b", alone) == ("b",)  # the measuring process holds one
