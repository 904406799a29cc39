"""The checker of the cluster tests notices what it is there for, without a cluster."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.checker import acknowledged, check_equal, check_mlflow, check_store
from tests.cluster.processes import Process, TooLong, kill_at_once, start, tree, wait_for

LINES = """    0.1 s [0/2] tasks are in the store
    1.0 s [1/2] done first
    2.0 s [1/2] failed second: ValueError
    3.0 s [2/2] done second
"""


def storage(folder: Path, **values: float) -> Path:
    """Write records whose figure is given; the label of each is its key."""
    for room in ("records", "tasks"):
        (folder / room).mkdir(parents=True)
    for key, value in values.items():
        outputs = {"psnr": value, "seconds": 7 * value, "rows": [[value]]}
        record = {"key": key, "kind": "evaluate", "state": "done", "artifacts": {}}
        (folder / "records" / f"{key}.json").write_text(json.dumps({**record, "outputs": outputs}))
        (folder / "tasks" / f"{key}.json").write_text(json.dumps({"key": key, "label": key}))
    return folder


def database(folder: Path, *runs: tuple[str, str]) -> Path:
    """Write MLflow's two tables. runs: task key and state."""
    path = folder / "mlflow.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE runs (run_uuid, status, lifecycle_stage)")
        connection.execute("CREATE TABLE tags (key, value, run_uuid)")
        for number, (key, state) in enumerate(runs):
            connection.execute("INSERT INTO runs VALUES (?, ?, 'active')", (number, state))
            connection.execute("INSERT INTO tags VALUES ('dipgo.task_key', ?, ?)", (key, number))
    return path


def test_acknowledged_are_the_lines_of_finished_tasks(tmp_path: Path) -> None:
    found = acknowledged(LINES, storage(tmp_path, first=1.0, second=2.0))
    assert found == ["first", "second"]


@pytest.mark.parametrize(
    ("acks", "told"),
    [(["first", "gone"], "not in the store"), (["first", "first"], "more than once")],
)
def test_lost_and_duplicated_acknowledgements_are_told(
    acks: list[str], told: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=told):
        check_store(storage(tmp_path, first=1.0), acks)


def test_records_may_differ_in_times_and_within_the_tolerance(tmp_path: Path) -> None:
    expected = storage(tmp_path / "a", first=1.0)
    check_equal(storage(tmp_path / "b", first=1.0 + 1e-9), expected)
    with pytest.raises(AssertionError, match=r"outputs\.psnr: 1\.1 against 1\.0"):
        check_equal(storage(tmp_path / "c", first=1.1), expected)
    with pytest.raises(AssertionError, match="more"):
        check_equal(storage(tmp_path / "d", first=1.0, second=1.0), expected)


@pytest.mark.parametrize(
    ("runs", "told"),
    [
        ([("a", "FINISHED")], "not in MLflow"),
        ([("a", "FINISHED"), ("b", "FINISHED"), ("b", "FAILED")], "more than one run"),
        ([("a", "FINISHED"), ("b", "RUNNING")], "left running"),
    ],
)
def test_mlflow_with_a_fault_is_told(runs: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=told):
        check_mlflow(database(tmp_path, *runs), ["a", "b"])


def test_whole_trees_are_killed_at_once(tmp_path: Path) -> None:
    child = start("sh", ["sh", "-c", "sleep 60 & sleep 60"], tmp_path, {"PATH": "/bin"}, tmp_path)
    wait_for("its children run", lambda: len(tree(child.pid)) == 3, 20)
    killed = kill_at_once([child.pid])
    child.process.wait(timeout=20)
    assert len(killed) == 3 and not any(process.runs for process in killed)
    assert Process.of(child.pid) is None


def test_waits_are_bounded_and_say_what_they_saw() -> None:
    with pytest.raises(TooLong, match=r"the moon: not within 0\.2 s\nclouds"):
        wait_for("the moon", lambda: False, 0.2, lambda: "clouds")
