"""Stopping, budgets, retries: oracle: which tasks ran, counted by hand on a made-up model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event as Flag
from typing import Any

import pytest

from dipgo_core.errors import StorageError, StoreError, TaskError
from orchestrator import sweep_tasks
from orchestrator.budget import Meter, limit_reached, spent_gpu_hours
from orchestrator.cli.stopping import drained_by_sigterm
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.failures import Failure
from orchestrator.records import Pool, Record, Task
from orchestrator.store import Store, lease, open_store
from orchestrator.store.lease import LeaseLost
from orchestrator.sweep_settings import AskedResources, Budget, Resources
from orchestrator.sweep_tasks import Event, RunResult, SweepTasks, Watch
from tests.orchestrator.tiny_sweep import Listener, run, run_tiny_task, tiny_facts, tiny_sweep


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def doing(action: Any, kind: str = "search") -> Any:
    """Run tiny tasks; before one of a kind, do something."""

    def run_task(task: Task, store: Store, *, on_progress: Any = None) -> Record:
        if task.kind == kind:
            action(task)
        return run_tiny_task(task, store)

    return run_task


def run_with(store: Store, task_function: Any, **options: Any) -> tuple[RunResult, Listener]:
    sweep, listener = tiny_sweep(targets=(0.5,)), Listener()
    result = run_sweep(
        sweep,
        store,
        InProcessExecutor(),
        listener,
        listener.events.append,
        run_task=task_function,
        facts=tiny_facts(sweep),
        **options,
    )
    return result, listener


def tasks_of(store: Store, **options: Any) -> SweepTasks:
    sweep = tiny_sweep(targets=(0.5,))
    listener = Listener()
    return SweepTasks(
        sweep, store, tiny_facts(sweep), "cpu", listener, listener.events.append, **options
    )


def test_signal_that_came_before_the_first_task_starts_none(store: Store) -> None:
    flag = Flag()
    flag.set()
    assert tasks_of(store, watch=Watch(stop=flag)).next_ready() is None


def test_stop_asked_for_before_the_first_task_starts_none(store: Store) -> None:
    source = tasks_of(store)
    store.request_stop("tiny")
    source.tick()
    assert source.next_ready() is None
    assert source.result(interrupted=False).interrupted


def test_signal_lets_the_running_task_end_and_starts_no_other(store: Store) -> None:
    clock, flag = Clock(), Flag()
    source = tasks_of(store, watch=Watch(stop=flag, clock=clock))
    task = source.next_ready()
    assert task is not None
    flag.set()
    clock.now += 2
    source.tick()
    assert source.draining and not source.finished and source.next_ready() is None
    source.done(run_tiny_task(task, store))
    assert source.finished
    result = source.result(interrupted=False)
    assert result.interrupted and result.done == (task.key,) and result.skipped


def test_request_to_stop_in_the_store_drains(store: Store) -> None:
    clock = Clock()
    source = tasks_of(store, watch=Watch(clock=clock))
    store.request_stop("tiny")
    clock.now += 6
    source.tick()
    assert source.finished and not source.demand()
    assert "stop" in (source.result(interrupted=False).stopped or "")


def test_request_of_an_earlier_run_is_forgotten(store: Store) -> None:
    store.request_stop("tiny")
    result, _ = run_with(store, run_tiny_task)
    assert result.plan.complete


def test_wall_time_is_of_one_run_and_gpu_time_of_all(store: Store) -> None:
    clock = Clock()
    meter = Meter(Budget(wall_hours=9, gpu_hours=3), store, "tiny", clock)
    meter.start("a", 2.0)
    clock.now += 1800
    assert meter.gpu_hours == pytest.approx(1)  # while it runs
    assert meter.reached() is None
    clock.now += 3600
    meter.end("a")
    meter.write(now=True)
    assert spent_gpu_hours(store, "tiny") == pytest.approx(3)
    assert meter.reached() == "3 GPU-hours"
    again = Meter(Budget(wall_hours=1), store, "tiny", clock)
    assert (again.gpu_hours, again.wall_hours) == (pytest.approx(3), 0)
    clock.now += 3600
    assert again.reached() == "1 hours of wall time"


def test_task_costs_what_it_held_whoever_computed_it(store: Store) -> None:
    """The record says 0.1 s, of another sweep's worker, on whose claim ours waited 90 s."""
    clock, gpu = Clock(), AskedResources(cpus=1, gpus=2)
    sweep = replace(tiny_sweep(), resources=Resources(reference=gpu))
    source = SweepTasks(sweep, store, tiny_facts(sweep), "cpu", Listener(), lambda event: None,
                        watch=Watch(clock=clock))  # fmt: skip
    task = source.next_ready()
    assert task is not None and task.gpus == 2
    clock.now += 90
    source.done(run_tiny_task(task, store))
    source.close()
    assert spent_gpu_hours(store, "tiny") == pytest.approx(180 / 3600)


def test_dollars_are_gpu_hours_at_their_price() -> None:
    budget = Budget(usd=10, usd_per_gpu_hour=2.5)
    assert limit_reached(budget, 3.9, 0) is None
    assert limit_reached(budget, 4.0, 0) == "10 US dollars"


def test_meter_refuses_what_no_run_wrote(store: Store) -> None:
    store.put_sweep_file("tiny", "spent.json", b"[]")
    with pytest.raises(StoreError, match="delete it"):
        Meter(Budget(), store, "tiny", Clock())


def fail(task: Task) -> None:
    raise ValueError("a bug")


def test_retry_runs_what_failed_and_what_depends_on_it_alone(store: Store) -> None:
    first, _ = run_with(store, doing(fail))
    for key in list(store.records()):  # another task that is open, and did not fail
        if store.records()[key].kind == "latency":
            assert store.folder is not None
            (store.folder / "records" / f"{key}.json").unlink()
    store = open_store(store.url)
    (key,) = first.failed
    result, _ = run_with(store, run_tiny_task, retry=[])
    assert key in result.done
    assert not result.failed and not result.skipped
    assert not result.plan.complete  # the latency of the dense model is not asked for
    assert {t.kind for t in result.plan.tasks if t.state != "cached"} == {"latency"}
    assert not store.failed_keys()


def test_retry_takes_the_first_characters_of_a_key(store: Store) -> None:
    first, _ = run_with(store, doing(fail))
    (key,) = first.failed
    assert key in run_with(store, run_tiny_task, retry=[key[:10]])[0].done
    with pytest.raises(TaskError, match="is done"):
        run_with(store, run_tiny_task, retry=[key])
    with pytest.raises(TaskError, match="no task of this sweep"):
        run_with(store, run_tiny_task, retry=["xyz"])


def test_out_of_memory_is_tried_at_half_the_batch_and_recorded(store: Store) -> None:
    batches = list[int]()

    def exhausted(task: Task) -> None:
        batches.append(task.options["batch_size"])
        if len(batches) == 1:
            raise MemoryError

    result, listener = run_with(store, doing(exhausted, "images"))
    assert result.plan.complete
    assert batches[1] == batches[0] // 2
    again = [event for event in listener.events if event.kind == "again"]
    assert len(again) == 1 and "out_of_memory" in (again[0].error or "")


def test_failure_is_kept_with_its_class_and_trace(store: Store) -> None:
    result, _ = run_with(store, doing(fail))
    failure = store.get_failure(next(iter(result.failed)))
    assert failure is not None
    assert failure.outputs["class"] == "code"
    assert "a bug" in failure.outputs["traceback"]


def test_lost_lease_ends_the_run_and_shows_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: SweepTasks) -> None:
        raise LeaseLost("somebody else holds it")

    monkeypatch.setattr(SweepTasks, "tick", lost)
    sweep, listener = replace(tiny_sweep(), name="tiny"), Listener()
    with pytest.raises(LeaseLost):
        run_sweep(sweep, store, InProcessExecutor(), listener, facts=tiny_facts(sweep))
    assert listener.results == []


def test_lease_lost_while_a_task_reports_ends_the_run_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another driver takes the sweep over during the second task (issue 5: one works)."""
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.02)
    begun: list[str] = []

    def reporting(task: Task, store: Store, *, on_progress: Any = None) -> Record:
        begun.append(task.key)
        if len(begun) == 2:
            other = {**asdict(lease.myself()), "boot": "another", "host": "far", "pid": 7}
            store.backend.put("sweeps/tiny/lease/00000002.json", json.dumps(other).encode())
            for _ in range(200):
                time.sleep(0.02)
                on_progress({"images": 1})
        return run_tiny_task(task, store)

    sweep, listener = tiny_sweep(), Listener()
    with pytest.raises(LeaseLost, match="process 7 on far"):
        run_sweep(
            sweep, store, InProcessExecutor(), listener, listener.events.append,
            run_task=reporting, facts=tiny_facts(sweep),
        )  # fmt: skip
    assert len(begun) == 2 and listener.results == [] and not store.failed_keys()


def test_lost_lease_lets_nothing_be_handed_out_nor_written(store: Store) -> None:
    held = [True]

    def check() -> None:
        if not held[0]:
            raise LeaseLost("somebody else holds it")

    source = tasks_of(store, watch=Watch(check_lease=check))
    task = source.next_ready()
    assert task is not None
    held[0] = False
    with pytest.raises(LeaseLost):
        source.next_ready()
    with pytest.raises(LeaseLost):
        source.failed(task.key, Failure(kind="code", error="a bug"))
    assert not store.failed_keys()


def test_error_of_the_display_is_no_failure_of_the_task(store: Store) -> None:
    def reporting(task: Task, store: Store, *, on_progress: Any = None) -> Record:
        on_progress({"images": 1})
        return run_tiny_task(task, store)

    def show(event: Event) -> None:
        if event.kind == "progress":
            raise ValueError("no terminal")

    sweep = tiny_sweep()
    with pytest.raises(ValueError, match="no terminal"):
        run_sweep(sweep, store, InProcessExecutor(), Listener(), show, run_task=reporting,
                  facts=tiny_facts(sweep))  # fmt: skip
    assert not store.failed_keys()


def test_lease_lost_as_the_executor_breaks_shows_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(InProcessExecutor):
        def run(self, source: Any, run_task: Any, store: Any) -> None:
            monkeypatch.setattr(SweepTasks, "check_lease", lost)
            raise StoreError("the probe stays")

    def lost(self: SweepTasks) -> None:
        raise LeaseLost("somebody else holds it")

    sweep, listener = tiny_sweep(), Listener()
    with pytest.raises(LeaseLost):
        run_sweep(sweep, store, Broken(), listener, facts=tiny_facts(sweep))
    assert listener.results == []


def hiccup(store: Store, monkeypatch: pytest.MonkeyPatch, call: str, room: str, times: int) -> None:
    """Let a call of the storage fail for names of one room, so often."""
    real, left = getattr(store.backend, call), [times]

    def failing(name: str, *args: Any, **options: Any) -> Any:
        if name.startswith(f"{room}/") and left[0]:
            left[0] -= 1
            raise StorageError(f"{name}: input/output error")
        return real(name, *args, **options)

    monkeypatch.setattr(store.backend, call, failing)


@pytest.mark.parametrize(
    ("call", "room"), [("put", "tasks"), ("put_if_absent", "records"), ("get", "records")]
)
def test_hiccup_of_the_storage_fails_no_task(
    call: str, room: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_tasks, "_PAUSE_S", 0.05)
    hiccup(store, monkeypatch, call, room, 2)
    result, _ = run_with(store, run_tiny_task)
    assert result.plan.complete and not result.failed


def test_failure_that_the_storage_did_not_take_is_written_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hiccup(store, monkeypatch, "put", "failures", 1)
    result, _ = run_with(store, doing(fail))
    assert result.failed and store.failed_keys() == frozenset(result.failed)


def test_second_sigterm_interrupts(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with drained_by_sigterm() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert "may finish" in capsys.readouterr().err


def test_run_again_after_a_budget_counts_what_was_spent(store: Store) -> None:
    assert not run(tiny_sweep(), store)[0].budget_reached  # nothing takes a GPU
    assert spent_gpu_hours(store, "tiny") == 0


def test_late_news_of_a_task_count_once(store: Store) -> None:
    source = tasks_of(store)
    task = source.next_ready()
    assert task is not None
    source.failed(task.key, Failure(kind="node_lost", error="gone"))
    source.failed(task.key, Failure(kind="node_lost", error="told again"))
    record = run_tiny_task(task, store)  # the worker was not lost after all
    source.done(record)
    source.done(record)
    result = source.result(interrupted=True)
    assert result.done == (task.key,) and not result.failed
    assert source.next_ready() != task


def test_error_of_a_run_is_not_hidden_by_showing_it(store: Store) -> None:
    class Broken(InProcessExecutor):
        def run(self, source: Any, run_task: Any, store: Any) -> None:
            raise StoreError("disk full")

    class Mute(Listener):
        def finish(self, result: RunResult) -> None:
            raise StoreError("no report either")

    sweep = tiny_sweep()
    with pytest.raises(StoreError, match="disk full"):
        run_sweep(sweep, store, Broken(), Mute(), facts=tiny_facts(sweep))


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from orchestrator.cli.stopping import drained_by_sigterm
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.store import open_store
from tiny_sweep import ALL_BASELINES, Listener, logging_task, tiny_facts, tiny_sweep
store, sweep = open_store(sys.argv[1]), tiny_sweep(baselines=ALL_BASELINES)
task = logging_task(Path(sys.argv[1]) / "log", 0.2)
with drained_by_sigterm() as stop:
    result = run_sweep(sweep, store, InProcessExecutor(), Listener(), run_task=task,
                       facts=tiny_facts(sweep), stop=stop)
sys.exit(130 if result.interrupted and len(result.done) == len(store.records()) else 1)
"""


def test_sigterm_ends_a_driver_with_everything_it_began_in_the_store(
    store: Store, repository: Path
) -> None:
    assert store.folder is not None
    log = store.folder / "log"
    command = [sys.executable, "-c", DRIVER, store.url, str(Path(__file__).parent)]
    with subprocess.Popen(command, cwd=repository) as driver:
        while not log.exists() or log.read_text().count("\n") < 3:
            assert driver.poll() is None
            time.sleep(0.02)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait() == 130
    assert 3 <= log.read_text().count("\n") == len(store.records())
    assert store.runner("tiny") is None
    assert run(tiny_sweep(), store)[0].plan.complete


def test_pools_tell_what_open_tasks_occupy_and_which_setting_says_so(store: Store) -> None:
    asked = AskedResources(cpus=2, gpus=1)
    sweep = replace(tiny_sweep(targets=(0.5,)), resources=Resources(search=asked))
    listener = Listener()
    source = SweepTasks(sweep, store, tiny_facts(sweep), "cpu", listener, listener.events.append)
    found = dict(source.pools())
    assert found.pop(Pool(cpus=2, gpus=1)) == ["resources.search"]
    assert found[Pool()] == ["resources.evaluate", "resources.reference", "resources.score"]
