"""`cache ls|gc|verify` and `run --wait`: what they print and how they end."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import StoreError
from orchestrator.cli import main, running
from orchestrator.cli.cache import needed_keys
from orchestrator.cli.options import ExitCode
from orchestrator.planned import Plan, PlannedTask
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.store.garbage import find_garbage, remove
from orchestrator.sweep_tasks import RunResult
from tests.orchestrator.tiny_sweep import ALL_BASELINES, run, run_tiny_task, tiny_sweep

TASK = Task(kind="search", inputs={"seed": 1})
QUICKSTART = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Return a store at the default place, with one record and garbage beside it."""
    monkeypatch.chdir(tmp_path)
    store = open_store(".dipgo")
    artifacts = {"curve.json": store.put_artifact(TASK.key, "curve.json", b"[]")}
    values = {"key": TASK.key, "kind": "search", "state": "done", "inputs": TASK.inputs}
    store.put_record(Record(**values, artifacts=artifacts))  # type: ignore[arg-type]
    store.put_progress(TASK.key, "checkpoint", b"1")
    return store


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


def test_cache_ls_lists_what_is_held(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("cache", "ls", "--json") == ExitCode.DONE
    document = json.loads(capsys.readouterr().out)
    assert document["storage"] == store.url
    assert document["objects"] == 3
    assert {held["room"] for held in document["held"]} == {"artifacts", "progress", "records"}
    assert call("cache", "ls", "--storage", store.url) == ExitCode.DONE
    assert "artifacts" in capsys.readouterr().out


def test_cache_gc_lists_then_removes(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("cache", "gc", "--dry-run") == ExitCode.DONE
    assert "1 objects" in capsys.readouterr().out
    assert store.get_progress(TASK.key, "checkpoint") == b"1"
    assert call("cache", "gc", "--json") == ExitCode.DONE
    (garbage,) = json.loads(capsys.readouterr().out)["garbage"]
    assert garbage["reason"] == "progress of a task that is done"
    assert store.get_progress(TASK.key, "checkpoint") is None
    assert store.has_record(TASK.key)


def test_cache_gc_of_unneeded_records_keeps_those_of_the_files(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("cache", "gc", "--unneeded") == ExitCode.USAGE
    assert "name at least one" in capsys.readouterr().err
    sweep = [str(QUICKSTART), "-o", f"storage={store.url}"]
    assert call("cache", "gc", *sweep) == ExitCode.DONE
    assert store.has_record(TASK.key)
    assert call("cache", "gc", *sweep, "--unneeded") == ExitCode.DONE
    assert not store.has_record(TASK.key)
    assert list(store.backend.list("artifacts")) == []


def stopped_between_rungs(store: Store) -> tuple[RunResult, set[str]]:
    """Run a sweep until its race begins; return the images that were scored by then."""

    def until_race(task: Task, store: Store, *, on_progress: object = None) -> Record:
        if task.kind == "race":
            raise KeyboardInterrupt
        return run_tiny_task(task, store)

    racing = tiny_sweep(rungs=(4, 16), baselines=ALL_BASELINES)
    result, _ = run(racing, store, until_race)
    assert result.interrupted
    scored = {k for k, r in store.records().items() if r.kind == "images" and "keep" in r.inputs}
    return result, scored


def test_images_of_a_race_that_is_not_over_stay(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    result, scored = stopped_between_rungs(store)
    assert scored <= needed_keys(store, result.plan)
    with pytest.raises(StoreError, match="is not finished.*--shards"):
        list(find_garbage(store, shards=True))
    run(tiny_sweep(rungs=(4, 16), baselines=ALL_BASELINES), store)
    assert store.unfinished_sweeps() == ()
    assert any("shard" in each.reason for each in find_garbage(store, shards=True))


def test_latencies_of_other_devices_are_needed(tmp_path: Path) -> None:
    store, inputs = open_store(tmp_path), {"keep": ["11"], "device": "one"}
    here = Task(kind="latency", inputs=inputs)
    there, other = (
        Task(kind="latency", inputs={**inputs, "device": "two"}),
        Task(kind="latency", inputs={**inputs, "keep": ["10"]}),
    )
    for task in (there, other):
        store.put_record(Record(key=task.key, kind="latency", state="done", inputs=task.inputs))
    listed = {"model": "m", "label": "", "needs": (), "state": "ready", "task": here}
    planned = PlannedTask(key=here.key, kind="latency", **listed)  # type: ignore[arg-type]
    plan = Plan(models=("m",), tasks=(planned,), points=())
    assert needed_keys(store, plan) == {here.key, there.key}


def test_finished_sweep_is_finished_still_when_all_it_does_not_need_is_gone(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    run(tiny_sweep(baselines=ALL_BASELINES), store)
    smaller, _ = run(tiny_sweep(), store)
    before = set(store.records())
    needed = needed_keys(store, smaller.plan)
    for garbage in list(find_garbage(store, needed=needed)):
        remove(store, garbage)
    assert set(store.records()) == before & needed
    assert len(before & needed) < len(before)
    again, _ = run(tiny_sweep(), store)
    assert again.done == ()
    assert again.plan.complete


def test_cache_verify_tells_damage_and_mends_it(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("cache", "verify") == ExitCode.DONE
    (artifact,) = store.backend.list("artifacts")
    store.backend.put(artifact, b"others")
    assert call("cache", "verify") == ExitCode.INTERNAL
    shown = capsys.readouterr()
    assert "SHA-256 differs" in shown.out
    assert "--repair" in shown.err
    assert call("cache", "verify", "--repair", "--json") == ExitCode.DONE
    assert len(json.loads(capsys.readouterr().out)["damaged"]) == 1
    assert call("cache", "verify") == ExitCode.DONE
    assert not store.has_record(TASK.key)


def test_cache_asks_for_a_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("cache", "ls") == ExitCode.USAGE
    assert "--storage" in capsys.readouterr().err
    assert call("cache", "ls", str(QUICKSTART), "--storage", "x") == ExitCode.USAGE


@pytest.mark.parametrize(("options", "wait_s"), [([], 0.0), (["--wait"], math.inf)])
def test_run_waits_for_another_driver_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], wait_s: float
) -> None:
    waits: list[float] = []

    def refuse(*given: Any, wait_s: float, **asked: Any) -> None:
        waits.append(wait_s)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(running, "run_sweep", refuse)
    sweep = [str(QUICKSTART), "-o", f"storage={tmp_path}", "--executor", "local"]
    assert call("run", *sweep, *options) == ExitCode.INTERRUPTED
    assert waits == [wait_s]
