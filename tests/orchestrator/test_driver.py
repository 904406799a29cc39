"""Driver: everything once, whatever fails or dies. Oracle: the records and a log of runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import StoreError
from orchestrator import driver
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.sweep_settings import AskedResources, Budget, Resources, TaskResources
from tests.orchestrator.tiny_sweep import (
    ALL_BASELINES,
    Listener,
    logging_task,
    run,
    run_tiny_task,
    tiny_facts,
    tiny_sweep,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def failing(kind: str) -> Any:
    def run_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        if task.kind == kind:
            raise RuntimeError("out of luck")
        return run_tiny_task(task, store)

    return run_task


def test_run_sweep_computes_everything_once(store: Store) -> None:
    result, listener = run(tiny_sweep(baselines=ALL_BASELINES), store)
    assert result.plan.complete
    assert sorted(result.done) == sorted(store.records())
    assert not result.failed
    assert not result.skipped
    assert listener.landed_keys == list(result.done)
    assert listener.results == [result]


def written(store: Store) -> dict[Path, int]:
    """Return when each file of the store was written, those of its lease left out."""
    assert store.folder is not None
    files = [path for path in store.folder.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files if path.parent.name != "lease"}


def test_run_sweep_again_does_nothing(store: Store) -> None:
    sweep = tiny_sweep(baselines=ALL_BASELINES)
    first, _ = run(sweep, store)
    before = written(store)
    again, listener = run(sweep, store, failing("search"))
    after = written(store)
    assert again.done == ()
    assert again.plan.complete
    assert set(again.cached) <= set(first.done)  # shards of what is done are not planned
    assert listener.landed_keys == []
    assert before == after


def test_run_sweep_starts_references_first_and_latencies_last(store: Store) -> None:
    _, listener = run(tiny_sweep(baselines=ALL_BASELINES), store)
    kinds = [e.task.kind for e in listener.events if e.kind == "started" and e.task]
    assert kinds[0] == "images"  # of the dense model
    assert kinds[kinds.index("latency") :] == ["latency"] * kinds.count("latency")


def test_run_sweep_never_counts_backwards(store: Store) -> None:
    """Merged shards leave the plan, and count all the same."""
    _, listener = run(tiny_sweep(baselines=ALL_BASELINES), store)
    done = [event.done for event in listener.events]
    assert done == sorted(done)
    assert done[-1] == listener.events[-1].total == len(store.records())


def test_run_sweep_reports_each_task_in_order(store: Store) -> None:
    _, listener = run(tiny_sweep(), store)
    assert listener.events[0].kind == "planned"
    assert [event.kind for event in listener.events[1:3]] == ["started", "done"]
    counts = Counter(event.kind for event in listener.events)
    assert counts["started"] == counts["done"] == len(store.records())


def test_run_sweep_goes_on_beside_a_failure(store: Store) -> None:
    sweep = tiny_sweep(targets=(0.5,), baselines=ALL_BASELINES)
    result, listener = run(sweep, store, failing("search"))
    assert set(result.failed.values()) == {"RuntimeError: out of luck"}
    assert len(result.failed) == 2  # the grid's search and the step masks
    # their points wait for ever: two evaluations (test, calibration) of a shard each, a latency
    assert len(result.skipped) == 10
    assert Counter(record.kind for record in store.records().values())["evaluate"] >= 4
    assert [e.error for e in listener.events if e.kind == "failed"] == list(result.failed.values())


def test_run_sweep_tries_failed_tasks_again(store: Store) -> None:
    sweep = tiny_sweep(targets=(0.5,))
    first, _ = run(sweep, store, failing("search"))
    again, _ = run(sweep, store)
    assert again.plan.complete
    assert set(first.failed) <= set(again.done)
    assert store.get_failure(next(iter(first.failed))) is None


def test_run_sweep_keeps_the_inputs_of_workers(store: Store) -> None:
    sweep = tiny_sweep()
    result, _ = run(sweep, store)
    facts = tiny_facts(sweep)["tiny"]
    assert store.get_blob(facts.test.sha256) == facts.test.blob()
    assert store.get_task(result.done[0]).key == result.done[0]
    assert store.get_sweep_file("tiny", "sweep.json") is not None


def test_run_sweep_stops_starting_tasks_at_the_budget(store: Store) -> None:
    gpu = AskedResources(cpus=1, gpus=1)
    sweep = replace(
        tiny_sweep(),
        resources=Resources(reference=gpu, search=gpu, evaluate=gpu, latency=gpu),
        budget=Budget(gpu_hours=0.3 / 3600),  # each task takes 0.2 GPU seconds or more
    )

    def run_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        time.sleep(0.2 * task.gpus)
        return run_tiny_task(task, store)

    result, _ = run(sweep, store, run_task)
    assert result.budget_reached
    kinds = [record.kind for record in store.records().values()]
    on_gpu = sum(kind in ("images", "search", "latency") for kind in kinds)
    assert 1 <= on_gpu <= 2
    assert result.skipped
    assert result.stopped is not None and "GPU-hours" in result.stopped
    assert not run(sweep, store)[0].done


def test_run_sweep_keeps_what_is_done_when_interrupted(store: Store) -> None:
    def interrupting(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        if task.kind == "evaluate":
            raise KeyboardInterrupt
        return run_tiny_task(task, store)

    result, listener = run(tiny_sweep(), store, interrupting)
    assert result.interrupted
    assert len(result.done) == len(store.records()) >= 3
    assert result.skipped
    assert listener.results == [result]


def test_run_sweep_refuses_a_second_driver(store: Store) -> None:
    with store.lease("tiny"), pytest.raises(StoreError, match=f"process {os.getpid()} on"):
        run(tiny_sweep(), store)


SLOW_DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tiny_sweep import ALL_BASELINES, logging_task, run, tiny_sweep
from orchestrator.store import Store, open_store
store = open_store(sys.argv[1])
run(tiny_sweep(baselines=ALL_BASELINES), store, logging_task(Path(sys.argv[1]) / "log", 0.1))
"""


def test_run_sweep_after_a_kill_computes_no_finished_task_again(
    store: Store, repository: Path
) -> None:
    log = store.folder / "log"
    command = [sys.executable, "-c", SLOW_DRIVER, store.url, str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=repository) as driver:
        while not log.exists() or log.read_text().count("\n") < 5:
            assert driver.poll() is None
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
    before = set(store.records())
    result, _ = run(tiny_sweep(baselines=ALL_BASELINES), store, logging_task(log, 0))
    runs = Counter(log.read_text().split())
    assert result.plan.complete
    assert len(before) >= 5
    assert set(result.cached) <= before
    assert max(runs.values()) == 1


def test_importing_driver_imports_no_torch() -> None:
    code = "import sys, orchestrator.driver; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_plan_sweep_finds_latencies_of_another_machine(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = tiny_sweep(baselines=ALL_BASELINES)
    run(sweep, store)
    monkeypatch.setattr(driver, "as_last_run", lambda *args: (sweep, tiny_facts(sweep)))
    monkeypatch.setattr(driver, "local_device", lambda sweep: "a laptop")
    assert driver.plan_sweep(sweep, store).complete  # with the device of the run


class Remote(InProcessExecutor):
    """Runs tasks here, as if on a cluster of GPUs."""

    def latency_device(self, resources: TaskResources) -> str:
        assert resources.accelerator == "A100"
        return "NVIDIA A100"


def test_run_sweep_plans_latencies_for_the_executors_device(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Resources(latency=AskedResources(gpus=1, accelerator="A100"))
    sweep = replace(tiny_sweep(), resources=gpu)
    facts = tiny_facts(sweep)
    driver.run_sweep(sweep, store, Remote(), Listener(), run_task=run_tiny_task, facts=facts)
    timed = [record for record in store.records().values() if record.kind == "latency"]
    assert {record.inputs["device"] for record in timed} == {"NVIDIA A100"}
    monkeypatch.setattr(driver, "as_last_run", lambda *args: (sweep, facts))
    assert driver.plan_sweep(sweep, store).complete  # read where no such GPU is


def test_run_sweep_shows_what_is_done_when_the_executor_breaks(store: Store) -> None:
    class Broken(InProcessExecutor):
        def run(self, source: Any, run_task: Any, store: Any) -> None:
            raise StoreError("disk full")

    listener = Listener()
    with pytest.raises(StoreError, match="disk full"):
        driver.run_sweep(tiny_sweep(), store, Broken(), listener, facts=tiny_facts(tiny_sweep()))
    assert [result.interrupted for result in listener.results] == [True]
