"""run_sweep: lease, plan, hand out tasks, plan again as records land, show the results."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dipgo_core.evaluation.device import device_name
from orchestrator.executors.base import Executor, Lane, RunTask
from orchestrator.facts import ModelFacts, known_items, refusal, with_kept_items
from orchestrator.failures import Failure, failure_record, next_attempt
from orchestrator.memory import local_gpu_memory_gb, with_gpu_memory
from orchestrator.plan import Memo, build_plan
from orchestrator.planned import Plan, PlannedTask
from orchestrator.preflight import Ready, as_last_run, prepare
from orchestrator.records import Pool, Record, Task, TaskKind
from orchestrator.resources import latency_resources
from orchestrator.store import Store
from orchestrator.sweep_settings import SweepFile
from orchestrator.task import run_task
from orchestrator.task.latency_process import stop_measuring

logger = logging.getLogger(__name__)

#: What reading commands on other machines need to know of the last run.
LAST_RUN = "last_run.json"

EventKind = Literal["planned", "started", "progress", "done", "failed"]

#: References unlock everything, searches take longest; latencies want the machine for themselves.
_ORDER: Mapping[TaskKind, int] = {
    "reference": 0, "images": 0, "race": 0, "statistics": 0, "search": 1, "evaluate": 2,
    "latency": 3,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a user who watches wants to know.

    task: None for `planned`. report: figures of a task in progress. error: of a failed one.
    """

    kind: EventKind
    plan: Plan
    task: Task | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    record: Record | None = None


OnEvent = Callable[[Event], None]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """How a run ended: keys of tasks, by what became of them in this run.

    failed: key to error. skipped: not run because of a failure, the budget or an interruption;
    tasks whose inputs never became known count under the plan's placeholder key.
    """

    plan: Plan
    done: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    interrupted: bool = False
    budget_reached: bool = False


class Audience(Protocol):
    """Who is shown a sweep: tracking server, report. `orchestrator.publish` has the real one."""

    def start(self, sweep: SweepFile, plan: Plan) -> None: ...

    def landed(self, record: Record, task: Task) -> None: ...

    def finish(self, result: RunResult) -> None: ...


def local_device(sweep: SweepFile, facts: Mapping[str, ModelFacts]) -> str:
    """Return the name of the device that this machine would measure latencies on."""
    return device_name("cuda" if latency_resources(sweep, facts).gpus else "cpu")


def latency_device(sweep: SweepFile, facts: Mapping[str, ModelFacts], executor: Executor) -> str:
    """Return the name of the device that latencies of this sweep are keyed on in a run.

    Raises:
        TaskError: the executor has no device that fits.
    """
    if any("latency" in model.evaluate.metrics for model in sweep.models):
        return executor.latency_device(latency_resources(sweep, facts))
    return local_device(sweep, facts)


def plan_sweep(sweep: SweepFile, store: Store) -> Plan:
    """Plan a sweep against its store, without torch and without network.

    What only the machine that ran it can know, such as its device, is taken from that run, and so
    are the commits that branches on the hub were then.

    Raises:
        PreflightError: something is missing that is needed whatever the network has.
    """
    last = _last_run(sweep, store)
    sweep, facts = as_last_run(sweep, last)
    facts = with_kept_items(facts, store.get_blob)
    device = last.get("device") or local_device(sweep, facts)
    sweep = with_gpu_memory(sweep, last.get("gpu_memory_gb") or local_gpu_memory_gb())
    records = store.records()
    memo: Memo = {}
    failed = set[str]()
    while True:  # who failed before a race decides whether there is a race, and what follows it
        plan = build_plan(sweep, records, facts=facts, device=device, memo=memo, failed=failed)
        found = {task.key for task in plan.tasks if _has_failed(task, store)}
        if found <= failed:
            return plan
        failed |= found


def _has_failed(task: PlannedTask, store: Store) -> bool:
    return task.state != "cached" and store.get_failure(task.key) is not None


def run_sweep(
    sweep: SweepFile,
    store: Store,
    executor: Executor,
    audience: Audience,
    on_event: OnEvent = lambda event: None,
    *,
    run_task: RunTask = run_task,
    facts: Mapping[str, ModelFacts] | None = None,
) -> RunResult:
    """Run whatever of the sweep is not in the store yet; to go on after any stop, run it again.

    facts: as `gather_facts` gives them; if None they are looked up, and what a run needs checked.

    Raises:
        PreflightError: something that the run needs is missing, or does not fit on its GPU.
        StoreError: another driver runs this sweep, or the store is damaged.
    """
    with store.lease(sweep.name), executor:
        last = _last_run(sweep, store)
        if facts is None:
            ready = prepare(sweep, last=last)
        else:
            ready = Ready(sweep=sweep, facts=facts, commits={})
        device = latency_device(ready.sweep, ready.facts, executor)
        memory = local_gpu_memory_gb()
        fitted = with_gpu_memory(ready.sweep, memory)
        source = SweepTasks(fitted, store, ready.facts, device, audience, on_event)
        if source.plan.too_large:
            raise refusal(sweep, source.plan.too_large)
        _write_inputs(sweep, store, ready, {"device": device, "gpu_memory_gb": memory})
        audience.start(sweep, source.plan)
        on_event(Event(kind="planned", plan=source.plan))
        try:
            interrupted = _execute(executor, source, run_task, store)
        except Exception:
            audience.finish(source.result(interrupted=True))  # what is done is shown all the same
            raise
        result = source.result(interrupted)
        audience.finish(result)
        return result


def _execute(executor: Executor, source: SweepTasks, run_task: RunTask, store: Store) -> bool:
    """Run until the source is finished; return whether the user interrupted."""
    if source.finished:
        return False
    try:
        executor.run(source, run_task, store)
    except KeyboardInterrupt:
        return True
    finally:
        stop_measuring()
    return False


def _last_run(sweep: SweepFile, store: Store) -> dict[str, Any]:
    data = store.get_sweep_file(sweep.name, LAST_RUN)
    noted: dict[str, Any] = {} if data is None else json.loads(data)
    return noted


def _write_inputs(sweep: SweepFile, store: Store, ready: Ready, machine: Mapping[str, Any]) -> None:
    """Keep prompts for the workers, the sweep as its file says it, and what it was resolved to.

    machine: what keys depend on of the machine that runs it.
    """
    for each in ready.facts.values():
        for items in (each.test, each.calibration):
            store.put_blob(items.blob())
    known = known_items(ready.sweep, ready.facts)
    kept = {
        "sweep.json": {**sweep.to_json(), "digest": sweep.digest},
        LAST_RUN: {**machine, "items": known, "commits": dict(ready.commits)},
    }
    for name, value in kept.items():
        store.put_sweep_file(sweep.name, name, json.dumps(value, indent=1, sort_keys=True).encode())


class SweepTasks:
    """Hands out the tasks of a sweep as they become ready (a TaskSource), longest first."""

    def __init__(
        self,
        sweep: SweepFile,
        store: Store,
        facts: Mapping[str, ModelFacts],
        device: str,
        audience: Audience,
        on_event: OnEvent,
    ) -> None:
        self._sweep = sweep
        self._store = store
        self._facts = facts
        self._device = device
        self._audience = audience
        self._on_event = on_event
        self._records = store.records()
        self._memo: Memo = {}
        self._running: dict[str, Task] = {}
        self._done: dict[str, Record] = {}
        self._failed: dict[str, str] = {}
        self._cached: dict[str, Record] = {}
        self._failures: dict[str, list[Failure]] = {}
        self._changed: dict[str, Task] = {}
        self._gpu_seconds = 0.0
        self.plan = self._planned()

    def next_ready(self, lane: Lane | None = None) -> Task | None:
        task = self._next()
        if task is not None and lane is not None and task.pool != lane.pool:
            return None
        if task is not None:
            task = self._changed.get(task.key, task)
            self._store.put_task(task)
            self._running[task.key] = task
        return task

    def demand(self) -> Mapping[Pool, int]:
        waiting = (task.task for task in self._queue if not self._taken(task.key))
        return Counter(task.pool for task in waiting if task is not None)

    @property
    def draining(self) -> bool:
        return self.budget_reached

    def tick(self) -> None:
        pass

    def started(self, key: str, host: str) -> None:
        self._on_event(Event(kind="started", plan=self.plan, task=self._running[key]))

    @property
    def finished(self) -> bool:
        return not self._running and self._next() is None

    @property
    def budget_reached(self) -> bool:
        limit = self._sweep.budget.gpu_hours
        return limit is not None and self._gpu_seconds >= limit * 3600

    def progress(self, key: str, report: Mapping[str, Any]) -> None:
        task = self._running.get(key)
        if task is not None:
            self._on_event(Event(kind="progress", plan=self.plan, task=task, report=report))

    def done(self, record: Record) -> None:
        task = self._running.pop(record.key)
        self._done[record.key] = record
        self._records.add(record.key)  # another process may have written it
        if record.kind in ("reference", "search", "race") or self._race_can_start():
            self.plan = self._planned()  # gates may be known now, or who goes on
        self._gpu_seconds += _gpu_seconds(task, record)
        self._audience.landed(record, task)
        self._on_event(Event(kind="done", plan=self.plan, task=task, record=record))

    def failed(self, key: str, failure: Failure) -> None:
        task, error = self._running.pop(key), failure.error
        self._failures.setdefault(key, []).append(failure)
        again = next_attempt(task, self._failures[key])
        if again is not None:
            self._changed[key] = again
            return
        self._failed[key] = error
        self._store.put_failure(failure_record(task, failure))
        logger.warning("%s failed: %s", task.label, error)
        if any(planned.kind == "race" for planned in self.plan.tasks):
            self.plan = self._planned()  # races go on without it
        self._on_event(Event(kind="failed", plan=self.plan, task=task, error=error))

    def result(self, interrupted: bool) -> RunResult:
        """Return what became of every task."""
        plan = self._planned()
        over = {*self._done, *self._cached, *self._failed}
        return RunResult(
            plan=plan,
            done=tuple(self._done),
            cached=tuple(self._cached),
            failed=self._failed,
            skipped=tuple(
                task.key for task in plan.tasks if task.key not in over and task.state != "cached"
            ),
            interrupted=interrupted,
            budget_reached=self.budget_reached,
        )

    def _planned(self) -> Plan:
        plan = build_plan(
            self._sweep,
            self._records,
            facts=self._facts,
            device=self._device,
            memo=self._memo,
            failed=self._failed,
        )
        for known in plan.tasks:  # what a race lets go on may be in the store already
            if known.state == "cached" and not (
                known.key in self._done or known.key in self._cached
            ):
                self._cached[known.key] = self._records[known.key]
                self._gpu_seconds += _gpu_seconds(known.task, self._cached[known.key])
        open_tasks = (task for task in plan.tasks if task.task and task.state != "cached")
        self._queue = sorted(open_tasks, key=_longest_first)
        return plan

    def _race_can_start(self) -> bool:
        """Whether everything that some race was waiting for is there."""
        races = (t for t in self.plan.tasks if t.kind == "race" and t.state == "unresolved")
        return any(race.needs and all(need in self._done for need in race.needs) for race in races)

    def _next(self) -> Task | None:
        """Return the ready task to start next; latencies only when nothing else is there to do."""
        if self.budget_reached:
            return None
        self._queue = [task for task in self._queue if not self._taken(task.key)]
        ready = (task.task for task in self._queue if self._is_ready(task))
        task = next(ready, None)
        busy = any(running.kind != "latency" for running in self._running.values())
        return None if task is not None and task.kind == "latency" and busy else task

    def _taken(self, key: str) -> bool:
        return key in self._running or key in self._failed or key in self._done

    def _is_ready(self, task: PlannedTask) -> bool:
        return all(need in self._done or need in self._cached for need in task.needs)


def _gpu_seconds(task: Task | None, record: Record) -> float:
    return record.timings.get("seconds", 0.0) * (task.gpus if task else 0.0)


def _longest_first(planned: PlannedTask) -> tuple[int, str, float]:
    """Order by kind, by model (a worker keeps few pipelines loaded), then by expected work."""
    assert planned.task is not None
    inputs = planned.task.inputs
    kept = sum(row.count("1") for row in inputs.get("keep", ()))
    work = {
        "statistics": lambda: kept,
        "reference": lambda: inputs["protocol"]["split"] == "calibration",  # searches wait for it
        "search": lambda: inputs["search"]["steps"],
        "images": lambda: kept,
        "evaluate": lambda: kept * inputs["protocol"]["images"],
        "latency": lambda: kept,
        "race": lambda: kept,
    }
    return _ORDER[planned.kind], planned.task.affinity, -float(work[planned.kind]())
