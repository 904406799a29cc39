"""One contract suite for every executor, with task functions that need no torch."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dipgo_core.errors import StoreError, TaskError
from dipgo_core.evaluation.device import device_name
from orchestrator.executors.base import Executor, Lane, RunTask
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.executors.placement import NODE
from orchestrator.failures import RETRIES, Failure, next_attempt
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
        self.aside: frozenset[Pool] = frozenset()
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

    def pools(self) -> Mapping[Pool, list[str]]:
        return {task.pool: ["resources.score"] for task in self.waiting.values()}

    def set_aside(self, pools: Collection[Pool]) -> None:
        self.aside = frozenset(pools)

    def _ready(self) -> list[Task]:
        self._drop_blocked()
        tasks = [t for t in self.waiting.values() if all(n in self.records for n in t.needs)]
        return [task for task in tasks if not task.exclusive] or tasks

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
    return Task(
        kind="evaluate", inputs={"number": number, **inputs}, needs=keys, label=f"t{number}"
    )


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


@pytest.fixture(scope="module", params=["in_process", "ray_tune"])
def executor(request: pytest.FixtureRequest) -> Executor:
    if request.param == "in_process":
        return InProcessExecutor()
    return request.getfixturevalue("ray_executor")  # type: ignore[no-any-return]


def run(executor: Executor, source: ListSource, folder: Path) -> ListSource:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        with executor:
            executor.run(source, fake_run_task(), open_store(folder))
    return source


def squares(source: ListSource) -> dict[int, int]:
    return {r.inputs["number"]: r.outputs["square"] for r in source.records.values()}


FIRST = task(2)
SECOND = [task(3, FIRST, seconds=0.3), task(4, FIRST, seconds=0.3)]
LAST = task(5, *SECOND)
BAD = task(7, fail=True)
SKIPPED = [task(8, BAD), task(9, task(8, BAD))]
ALONE = Task(kind="latency", inputs={"number": 6, "seconds": 0.3}, exclusive=True)
OTHERS = [task(number, seconds=0.2) for number in range(10, 16)]
HUNGRY = replace(task(20, hungry=True), options={"batch_size": 8})


class Ran(NamedTuple):
    """One run of everything, and where its records lie."""

    source: ListSource
    folder: Path


@pytest.fixture(scope="module")
def ran(executor: Executor, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("store")
    tasks = [LAST, *SECOND, FIRST, *SKIPPED, BAD, *OTHERS[:3], ALONE, *OTHERS[3:], HUNGRY]
    return Ran(run(executor, ListSource(tasks, again=True), folder), folder)


def test_dependencies_are_honoured_and_records_are_those_stored(ran: Ran) -> None:
    assert {n: s for n, s in squares(ran.source).items() if n < 6} == {2: 4, 3: 9, 4: 16, 5: 25}
    assert dict(open_store(ran.folder).records()) == ran.source.records


def test_failure_of_a_task_skips_what_needs_it_and_nothing_else(ran: Ran) -> None:
    assert ran.source.errors == {
        BAD.key: "ValueError: number 7 is unlucky",
        SKIPPED[0].key: "skipped",
        SKIPPED[1].key: "skipped",
    }
    assert len(ran.source.records) == 12


def test_failure_of_a_task_tells_its_class_and_trace(ran: Ran) -> None:
    failure = ran.source.failures[BAD.key]
    assert failure.kind == "code"
    assert "is unlucky" in failure.trace
    assert failure.host


def test_exclusive_task_is_alone_on_its_node(ran: Ran) -> None:
    spans = {key: record.outputs["span"] for key, record in ran.source.records.items()}
    began, ended = spans.pop(ALONE.key)
    assert all(end <= began or ended <= start for start, end in spans.values())


def test_task_out_of_memory_is_done_at_half_the_batch(ran: Ran) -> None:
    assert squares(ran.source)[20] == 400
    assert [each.kind for each in ran.source.failed_before[HUNGRY.key]] == ["out_of_memory"]


def test_progress_reaches_the_source(ran: Ran) -> None:
    assert (FIRST.key, {"search_step": 1}) in ran.source.reports


def test_lane_does_its_tasks_in_one_process(ran: Ran) -> None:
    pids = {
        record.host["pid"] for record in ran.source.records.values() if record.kind == "evaluate"
    }
    assert len(pids) <= 4  # two slots, filled once before and once after the exclusive task


def test_run_ends_when_nothing_can_become_ready(executor: Executor, tmp_path: Path) -> None:
    source = run(executor, ListSource([task(2, BAD), BAD]), tmp_path)
    assert len(source.errors) == 2
    assert not source.records


def test_finished_source_runs_nothing(executor: Executor, tmp_path: Path) -> None:
    assert not run(executor, ListSource([]), tmp_path).records


def test_draining_source_ends_once_running_tasks_are_done(
    executor: Executor, tmp_path: Path
) -> None:
    source = ListSource([task(number, seconds=0.05) for number in range(20)])
    source.stop_after = 4
    run(executor, source, tmp_path)
    assert 4 <= len(source.records) < 20
    assert not source.running and not source.errors


@pytest.fixture(scope="module")
def survived(ray_executor: Executor, tmp_path_factory: pytest.TempPathFactory) -> ListSource:
    """Workers that die, one once and one always; a task too large to run beside others; models."""
    large = replace(task(32, task(31)), cpus=2.0)
    models = [replace(task(33, large), affinity="a"), replace(task(34, task(33)), affinity="b")]
    lost = [task(30, die_once=True), task(1, die=True), task(35, task(1, die=True))]
    tasks = [*lost, task(31), large, *models, task(36, models[1], seconds=2)]
    folder = tmp_path_factory.mktemp("store")
    return run(ray_executor, ListSource(tasks, again=True), folder)


def test_task_of_a_killed_worker_is_done_by_another(survived: ListSource) -> None:
    assert squares(survived)[30] == 900
    kinds = [each.kind for each in survived.failed_before[task(30, die_once=True).key]]
    assert kinds == ["worker_lost"]


def test_task_that_kills_its_worker_is_given_up(survived: ListSource) -> None:
    lost = task(1, die=True)
    assert set(survived.errors) == {lost.key, task(35, lost).key}
    assert len(survived.failed_before[lost.key]) == 1 + RETRIES["worker_lost"]
    assert survived.failures[lost.key].host


def test_lanes_of_another_pool_take_the_place_of_idle_ones(survived: ListSource) -> None:
    assert squares(survived)[32] == 32**2  # both CPUs
    assert squares(survived)[36] == 36**2  # one again


def test_lane_tells_whose_pipelines_it_holds(survived: ListSource) -> None:
    held = {lane.held for lane in survived.lanes if lane is not None}
    assert () in held
    assert held <= {(), ("a",), ("b",), ("b", "a")}


def test_source_is_ticked_while_tasks_run(survived: ListSource) -> None:
    assert survived.ticks >= 6


def test_failure_names_the_log_of_its_worker(ray_executor: Executor, tmp_path: Path) -> None:
    (failure,) = run(ray_executor, ListSource([BAD]), tmp_path).failures.values()
    assert failure.log is not None
    assert Path(failure.log).is_file()


def test_node_that_cannot_see_the_storage_is_named(ray_executor: Executor, tmp_path: Path) -> None:
    import ray

    from orchestrator.executors.ray_tune.nodes import check_storage, working_nodes

    with ray_executor, pytest.raises(StoreError, match=r"node 127\.\d.*cannot read|node \d"):
        check_storage(open_store(tmp_path), "nobodywrotethis", working_nodes(ray.nodes()))


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
