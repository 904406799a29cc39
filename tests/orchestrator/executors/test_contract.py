"""One contract suite for every executor, with task functions that need no torch."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import TaskError
from dipgo_core.evaluation.device import device_name
from orchestrator.executors.base import Executor, Lane, RunTask
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.executors.placement import NODE
from orchestrator.failures import Failure, next_attempt
from orchestrator.records import Pool, Record, Task
from orchestrator.store import open_store
from orchestrator.sweep_settings import TaskResources


class ListSource:
    """Serves a fixed list of tasks; remembers what happened."""

    def __init__(self, tasks: list[Task], again: bool = False) -> None:
        self.again = again
        self.given: dict[str, Task] = {}
        self.failed_before: dict[str, list[Failure]] = {}
        self.lanes: list[Lane | None] = []
        self.hosts: set[str] = set()
        self.stop_after: int | None = None
        self.waiting = {task.key: task for task in tasks}
        self.running: set[str] = set()
        self.records: dict[str, Record] = {}
        self.errors: dict[str, str] = {}
        self.failures: dict[str, Failure] = {}
        self.ticks = 0
        self.reports: list[tuple[str, Mapping[str, Any]]] = []

    def next_ready(self, lane: Lane | None = None) -> Task | None:
        for task in self._ready():
            if not self.draining and (lane is None or task.pool == lane.pool):
                self.lanes.append(lane)
                self.running.add(task.key)
                self.given[task.key] = task
                return self.waiting.pop(task.key)
        return None

    def demand(self) -> Mapping[Pool, int]:
        return Counter() if self.draining else Counter(task.pool for task in self._ready())

    def _ready(self) -> list[Task]:
        self._drop_blocked()
        tasks = self.waiting.values()
        return [task for task in tasks if all(need in self.records for need in task.needs)]

    @property
    def draining(self) -> bool:
        return self.stop_after is not None and len(self.records) >= self.stop_after

    def tick(self) -> None:
        self.ticks += 1

    def started(self, key: str, host: str) -> None:
        assert key in self.running
        self.hosts.add(host)

    @property
    def finished(self) -> bool:
        self._drop_blocked()
        return (self.draining or not self.waiting) and not self.running

    def _drop_blocked(self) -> None:
        blocked = [
            key for key, task in self.waiting.items() if any(n in self.errors for n in task.needs)
        ]
        for key in blocked:
            self.errors[key] = "skipped"
            del self.waiting[key]
            self._drop_blocked()

    def progress(self, key: str, report: Mapping[str, Any]) -> None:
        self.reports.append((key, report))

    def done(self, record: Record) -> None:
        self.running.remove(record.key)
        self.records[record.key] = record

    def failed(self, key: str, failure: Failure) -> None:
        self.running.remove(key)
        self.failed_before.setdefault(key, []).append(failure)
        again = next_attempt(self.given[key], self.failed_before[key]) if self.again else None
        if again is not None:
            self.waiting[key] = again
            return
        self.failures[key] = failure
        self.errors[key] = failure.error


def task(number: int, *needs: Task, **inputs: Any) -> Task:
    keys = tuple(need.key for need in needs)
    return Task(kind="search", inputs={"number": number, **inputs}, needs=keys, label=f"t{number}")


def fake_run_task() -> RunTask:
    """A task function that squares its number; a closure, so that workers get it by value."""

    def run_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        import os
        import time

        if task.inputs.get("fail"):
            raise ValueError(f"number {task.inputs['number']} is unlucky")
        if task.inputs.get("die"):
            os._exit(1)
        if task.inputs.get("die_once"):
            before = store.get_progress(task.key, "attempts")
            store.put_progress(task.key, "attempts", b"one")
            if before is None:
                os.kill(os.getpid(), 9)
        if task.inputs.get("hungry") and task.options.get("batch_size", 8) > 4:
            raise MemoryError("batch of 8")
        on_progress({"search_step": 1})
        began = time.time()
        time.sleep(task.inputs.get("seconds", 0))
        assert all(store.has_record(need) for need in task.needs)
        record = Record(
            key=task.key,
            kind=task.kind,
            state="done",
            inputs=task.inputs,
            outputs={"square": task.inputs["number"] ** 2, "span": [began, time.time()]},
            host={"pid": os.getpid()},
        )
        store.put_record(record)
        return record

    return run_task


@pytest.fixture(scope="module")
def ray_executor() -> Iterator[Executor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray = pytest.importorskip("ray")
        from orchestrator.executors.ray_tune.run import RayTuneExecutor

        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=128 * 2**20,
            resources={NODE: 1.0},
        )
        yield RayTuneExecutor()
        ray.shutdown()


@pytest.fixture(params=["in_process", "ray_tune"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "in_process":
        return InProcessExecutor()
    return request.getfixturevalue("ray_executor")  # type: ignore[no-any-return]


@pytest.fixture
def run(executor: Executor, tmp_path: Path) -> Callable[..., ListSource]:
    return runner(executor, tmp_path)


def runner(executor: Executor, tmp_path: Path) -> Callable[..., ListSource]:
    def run(tasks: list[Task], *, again: bool = False, stop_after: int | None = None) -> ListSource:
        source = ListSource(tasks, again)
        source.stop_after = stop_after
        store = open_store(tmp_path / "store")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's own
            with executor:
                executor.run(source, fake_run_task(), store)
        return source

    return run


@pytest.fixture
def ray_run(ray_executor: Executor, tmp_path: Path) -> Callable[..., ListSource]:
    return runner(ray_executor, tmp_path)


def test_executor_honours_dependencies_and_returns_the_stored_records(
    run: Callable[..., ListSource], tmp_path: Path
) -> None:
    first = task(2)
    second = [task(3, first), task(4, first)]
    last = task(5, *second)
    source = run([last, *second, first])
    stored = open_store(tmp_path / "store").records()
    assert not source.errors
    assert {r.inputs["number"]: r.outputs["square"] for r in source.records.values()} == {
        2: 4,
        3: 9,
        4: 16,
        5: 25,
    }
    assert dict(stored) == source.records


def test_executor_goes_on_after_a_failure_and_keeps_its_text(
    run: Callable[..., ListSource],
) -> None:
    bad = task(7, fail=True)
    skipped = task(8, bad)
    source = run([bad, skipped, task(9)])
    failure = source.failures[bad.key]
    assert source.errors == {
        bad.key: "ValueError: number 7 is unlucky",
        skipped.key: "skipped",
    }
    assert [record.outputs["square"] for record in source.records.values()] == [81]
    assert failure.kind == "code"
    assert "unlucky" in failure.trace
    assert source.ticks


def test_executor_ends_when_nothing_can_become_ready(run: Callable[..., ListSource]) -> None:
    bad = task(1, fail=True)
    source = run([task(2, bad), bad])
    assert len(source.errors) == 2
    assert not source.records


def test_executor_with_a_finished_source_runs_nothing(run: Callable[..., ListSource]) -> None:
    assert not run([]).records


def test_executor_runs_an_exclusive_task_among_others(run: Callable[..., ListSource]) -> None:
    alone = Task(kind="latency", inputs={"number": 6}, exclusive=True)
    source = run([task(1), task(2), task(3), alone, task(4)])
    assert sorted(r.outputs["square"] for r in source.records.values()) == [1, 4, 9, 16, 36]


def test_executor_reports_progress(run: Callable[..., ListSource]) -> None:
    only = task(3)
    assert run([only]).reports == [(only.key, {"search_step": 1})]


def test_lane_does_its_tasks_in_one_process(
    run: Callable[..., ListSource], executor: Executor
) -> None:
    source = run([task(number) for number in range(10)])
    pids = {record.host["pid"] for record in source.records.values()}
    assert len(source.records) == 10
    assert len(pids) <= 2  # one a slot


def test_lane_tells_whose_pipelines_it_holds(
    ray_run: Callable[..., ListSource],
) -> None:
    tasks = [replace(task(number), affinity=f"model {number}") for number in range(3)]
    chained = [tasks[0], replace(tasks[1], needs=(tasks[0].key,))]
    source = ray_run([*chained, replace(tasks[2], needs=(chained[1].key,))])
    held = [lane.held for lane in source.lanes if lane is not None]
    assert set(held) <= {(), ("model 0",), ("model 1",), ("model 1", "model 0")}
    assert held[0] == ()


def test_lost_worker_is_a_failure_of_its_class(ray_run: Callable[..., ListSource]) -> None:
    lost = task(1, die=True)
    source = ray_run([lost, task(2, lost), task(3)])
    assert [record.outputs["square"] for record in source.records.values()] == [9]
    assert set(source.errors) == {lost.key, task(2, lost).key}
    assert source.failures[lost.key].kind == "worker_lost"
    assert source.failures[lost.key].host


def test_task_of_a_killed_worker_is_done_by_another(ray_run: Callable[..., ListSource]) -> None:
    killed = task(5, die_once=True)
    source = ray_run([killed, task(6)], again=True)
    assert not source.errors
    assert {record.outputs["square"] for record in source.records.values()} == {25, 36}
    assert [each.kind for each in source.failed_before[killed.key]] == ["worker_lost"]


def test_task_out_of_memory_is_done_at_half_the_batch(run: Callable[..., ListSource]) -> None:
    hungry = replace(task(4, hungry=True), options={"batch_size": 8})
    source = run([hungry], again=True)
    assert [record.outputs["square"] for record in source.records.values()] == [16]
    assert [each.kind for each in source.failed_before[hungry.key]] == ["out_of_memory"]


def test_failure_of_a_task_names_host_log_and_trace(ray_run: Callable[..., ListSource]) -> None:
    (failure,) = ray_run([task(7, fail=True)]).failures.values()
    assert failure.kind == "code"
    assert failure.host in failure_hosts()
    assert failure.log is not None and Path(failure.log).exists()
    assert "unlucky" in failure.trace


def failure_hosts() -> set[str]:
    import ray

    return {node["NodeManagerAddress"] for node in ray.nodes()}


def test_draining_source_ends_the_run_once_running_tasks_are_done(
    run: Callable[..., ListSource],
) -> None:
    source = run([task(number, seconds=0.05) for number in range(20)], stop_after=4)
    assert 4 <= len(source.records) < 20
    assert not source.running and not source.errors


def test_lanes_of_another_pool_take_the_place_of_idle_ones(
    ray_run: Callable[..., ListSource],
) -> None:
    small = [task(number) for number in range(4)]
    large = replace(task(9, small[3]), cpus=2.0)
    after = task(10, large)
    source = ray_run([*small, large, after])
    assert len(source.records) == 6 and not source.errors


def test_source_is_ticked_while_tasks_run(ray_run: Callable[..., ListSource]) -> None:
    assert ray_run([task(1, seconds=2)]).ticks >= 4


def test_executor_knows_the_device_of_latencies(executor: Executor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with executor:
            assert executor.latency_device(TaskResources()) == device_name()


def test_executor_refuses_an_accelerator_that_is_not_there(executor: Executor) -> None:
    abacus = TaskResources(gpus=1, accelerator="ABACUS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with executor, pytest.raises(TaskError, match="ABACUS"):
            executor.latency_device(abacus)


def test_exclusive_task_is_alone_on_its_node(run: Callable[..., ListSource]) -> None:
    alone = Task(kind="latency", inputs={"number": 0, "seconds": 0.3}, exclusive=True)
    others = [task(number, seconds=0.3) for number in range(1, 5)]
    spans = {
        record.key: record.outputs["span"]
        for record in run([*others[:2], alone, *others[2:]]).records.values()
    }
    began, ended = spans.pop(alone.key)
    assert all(end <= began or ended <= start for start, end in spans.values())
