"""SweepTasks: a sweep as a TaskSource. Hands tasks out and keeps what became of them."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from threading import Event as Flag
from typing import Any, Literal, Protocol

from dipgo_core.errors import StorageError, StoreError
from orchestrator.budget import Meter
from orchestrator.executors.base import Lane
from orchestrator.facts import ModelFacts
from orchestrator.failures import Failure, failure_of, failure_record, next_attempt, wait_s
from orchestrator.jobs import Jobs
from orchestrator.plan import Planner
from orchestrator.planned import Plan, PlannedTask
from orchestrator.records import Pool, Record, Task
from orchestrator.scheduler import Job, Scheduler
from orchestrator.selection import Selection, select
from orchestrator.store import Store
from orchestrator.sweep_settings import SweepFile

logger = logging.getLogger(__name__)

#: How often the lease is looked at, and requests to stop in the store.
_CHECK_EVERY_S, _ASK_EVERY_S = 1.0, 5.0
#: A plan is made anew at most for this share of the time, and at least so often if tasks ended.
_PLANNING_SHARE, _HUNGRY_SHARE, _PLAN_EVERY_S = 0.1, 0.5, 30.0
#: How long planning waits for a storage that did not answer.
_PAUSE_S = 2.0

EventKind = Literal["planned", "started", "progress", "done", "failed", "again"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something a user who watches wants to know.

    done, total: tasks of the sweep that have their record, and all that are known of.
    task: None for `planned`. report: figures of a task in progress. error: of one that failed, for
    good or (`again`) to be tried again.
    """

    kind: EventKind
    done: int
    total: int
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
    stopped: why nothing more was started though there was work; None if that did not happen.
    unshown: whether the user interrupted before the results were shown.
    """

    plan: Plan
    done: tuple[str, ...] = ()
    cached: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    interrupted: bool = False
    budget_reached: bool = False
    stopped: str | None = None
    unshown: bool = False


class Audience(Protocol):
    """Who is shown a sweep: tracking server, report. `orchestrator.publish` has the real one."""

    def start(self, sweep: SweepFile, plan: Plan) -> None: ...

    def landed(self, record: Record, task: Task) -> None: ...

    def finish(self, result: RunResult) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Watch:
    """What a run looks at once a second.

    check_lease: raises if the sweep belongs to another driver now. stop: set by a signal.
    """

    check_lease: Callable[[], None] = lambda: None
    stop: Flag = field(default_factory=Flag)
    clock: Callable[[], float] = time.monotonic


class SweepTasks:
    """Hands out the tasks of a sweep as they become ready; plans anew when records decide more.

    retry: keys, or their first characters, of the only tasks to be done, with what depends on them;
    empty: those that failed in earlier runs; None: the whole sweep is done.
    """

    def __init__(
        self,
        sweep: SweepFile,
        store: Store,
        facts: Mapping[str, ModelFacts],
        device: str,
        audience: Audience,
        on_event: OnEvent,
        *,
        retry: Sequence[str] | None = None,
        watch: Watch | None = None,
    ) -> None:
        self._sweep = sweep
        self._store = store
        self._audience = audience
        self._on_event = on_event
        self._only: Selection | None = None
        self._watch = watch or Watch()
        self._clock = self._watch.clock
        self._records = store.records()
        self._planner = Planner(sweep, facts=facts, device=device)
        self._ended_since = set[str]()  # since the last plan
        self._scheduler = Scheduler()
        self._jobs = Jobs(sweep, facts, device)
        self._meter = Meter(sweep.budget, store, sweep.name, self._clock)
        self._tasks: dict[str, PlannedTask] = {}  # those without a record
        self._total = 0
        self._running: dict[str, Task] = {}
        self._done: dict[str, None] = {}
        self._cached: dict[str, None] = {}
        self._failed: dict[str, str] = {}
        self._failures: dict[str, list[Failure]] = {}
        self._again: dict[str, Task] = {}
        self._unwritten: dict[str, Record] = {}  # failures that the storage did not take
        self._stopped: str | None = None
        self._budget_reached = False
        self._interrupted = False
        self._checked = self._asked = float("-inf")
        self._plan_after = self._clock()
        self.plan = self._new_plan()
        if retry is not None:
            self._only = select(self.plan, retry, self._failed_before())
        self._jobs.learn_from(self.plan, self._records)
        self._take_over()

    # --- a TaskSource ------------------------------------------------------------------------

    def next_ready(self, lane: Lane | None = None) -> Task | None:
        self.check_lease()
        self._look_at_flag()
        self._look_at_budget()
        if self._stopped is not None:
            return None
        key = self._scheduler.take(lane, self._clock())
        if key is None and self._plan_if_due(hungry=True):
            key = self._scheduler.take(lane, self._clock())
        if key is None:
            return None
        task = self._task(key)
        self._running[key] = task
        self._meter.start(key, task.gpus)
        try:
            self._store.put_task(task)
        except StorageError as error:
            self.failed(key, failure_of(error))
            return None
        return task

    def demand(self) -> Mapping[Pool, int]:
        if self._stopped is not None:
            return {}
        if not self._scheduler.demand(self._clock()):
            self._plan_if_due(hungry=True)
        return self._scheduler.demand(self._clock())

    def pools(self) -> Mapping[Pool, Sequence[str]]:
        wanted, found = self._wanted(self.plan), dict[Pool, set[str]]()
        for key, task in self._tasks.items():
            if wanted is None or key in wanted:
                found.setdefault(self._jobs.pool(task), set()).add(self._jobs.setting(task))
        return {pool: sorted(settings) for pool, settings in found.items()}

    def set_aside(self, pools: Collection[Pool]) -> None:
        self._scheduler.set_aside = pools

    @property
    def finished(self) -> bool:
        if self._running:
            return False
        self._look_at_budget()
        if self._stopped is not None:
            return True
        if self._scheduler.idle and self._ended_since:
            self._plan_if_due(hungry=True, last=True)  # the last records may have decided more
        return self._scheduler.idle and not self._ended_since

    @property
    def draining(self) -> bool:
        return self._stopped is not None

    def tick(self) -> None:
        """Look at the lease, at requests to stop, at the budget and at the plan.

        Raises:
            StoreError: the sweep belongs to another driver now.
        """
        now = self._clock()
        if now - self._checked < _CHECK_EVERY_S:
            return
        self._checked = now
        self.check_lease()
        self._write_failures()
        self._look_for_stop(now)
        self._look_at_budget()
        self._meter.write()
        if self._stopped is None:
            self._plan_if_due(hungry=False)

    def check_lease(self) -> None:
        """See that the sweep is still this driver's.

        Raises:
            LeaseLost: it is another's now.
        """
        self._watch.check_lease()

    def started(self, key: str, host: str) -> None:
        self._tell("started", self._running[key])

    def progress(self, key: str, report: Mapping[str, Any]) -> None:
        task = self._running.get(key)
        if task is not None:
            self._tell("progress", task, report=report)

    def done(self, record: Record) -> None:
        """Take a record; it counts once, and also if its worker was believed to be lost."""
        if record.key not in self._tasks:
            return
        task = self._running.pop(record.key, None) or self._task(record.key)
        self._done[record.key] = None
        self._failures.pop(record.key, None)
        self._again.pop(record.key, None)
        self._unwritten.pop(record.key, None)
        self._records.add(record.key)
        self._tasks.pop(record.key, None)
        self._meter.end(record.key)
        self._jobs.learn(record)
        self._ended_since.add(record.key)
        self._stale |= self._scheduler.finish(record.key)
        self._audience.landed(record, task)
        self._tell("done", task, record=record)

    def failed(self, key: str, failure: Failure) -> None:
        self.check_lease()
        task = self._running.pop(key, None)
        if task is None:  # told before, or done after all
            return
        self._meter.end(key)
        failures = self._failures.setdefault(key, [])
        failures.append(failure)
        again = next_attempt(task, failures)
        if again is not None:
            self._try_again(again, failures)
            return
        self._failed[key] = failure.error
        self._scheduler.give_up(key)
        self._ended_since.add(key)
        self._stale = True  # races and explorations go on without it
        self._unwritten[key] = failure_record(task, failure)
        self._write_failures()
        logger.warning("%s failed: %s", task.label, failure.error)
        self._tell("failed", task, error=failure.error)

    # --- the run -----------------------------------------------------------------------------

    def announce(self) -> None:
        """Tell whoever watches that there is a plan."""
        self._tell("planned", None)

    def stop(self, why: str) -> None:
        """Hand out nothing more; what runs may end."""
        if self._stopped is None:
            self._stopped = why
            logger.info("nothing more is started: %s", why)

    def close(self) -> None:
        """Note what was spent, and what failed."""
        self._meter.write(now=True)
        self._write_failures()

    def result(self, interrupted: bool) -> RunResult:
        """Return what became of every task."""
        plan = self._new_plan()
        wanted = self._wanted(plan)
        left = tuple(
            task.key
            for task in plan.tasks
            if task.state != "cached"
            and task.key not in self._failed
            and (wanted is None or task.key in wanted)
        )
        return RunResult(
            plan=plan,
            done=tuple(self._done),
            cached=tuple(self._cached),
            failed=dict(self._failed),
            skipped=left,
            interrupted=interrupted or (self._interrupted and bool(left)),
            budget_reached=self._budget_reached,
            stopped=self._stopped if left else None,
        )

    def _failed_before(self) -> list[str]:
        failed = self._store.failed_keys()
        return [t.key for t in self.plan.tasks if t.state != "cached" and t.key in failed]

    def _look_at_budget(self) -> None:
        reached = self._meter.reached() if self._stopped is None else None
        if reached is not None:
            self._budget_reached = True
            self.stop(f"the budget of {reached} is reached")

    def _look_at_flag(self) -> None:
        if self._watch.stop.is_set():
            self._interrupted = True
            self.stop("the run was told to stop by a signal")

    def _look_for_stop(self, now: float) -> None:
        self._look_at_flag()
        if self._stopped is not None or now - self._asked < _ASK_EVERY_S:
            return
        self._asked = now
        try:
            asked = self._store.stop_requested(self._sweep.name)
        except StoreError as error:
            logger.warning("requests to stop cannot be read: %s", error)
            return
        if asked:
            self._interrupted = True
            self.stop("`dipgo-sweep stop` asked for it")

    def _write_failures(self) -> None:
        """Keep what failed for good; what the storage does not take now it is given again."""
        for key, record in list(self._unwritten.items()):
            try:
                self._store.put_failure(record)
            except StorageError as error:
                logger.warning("a failure is not kept yet: %s", error)
                return
            del self._unwritten[key]

    def _try_again(self, again: Task, failures: list[Failure]) -> None:
        key, last = again.key, failures[-1]
        self._again[key] = again
        job = self._jobs.job(replace(self._tasks[key], task=again))
        self._scheduler.put_back(key, job, self._clock() + wait_s(failures))
        logger.warning("%s is tried again after %s: %s", again.label, last.kind, last.error)
        self._tell("again", again, error=f"{last.kind}: {last.error}")

    def _task(self, key: str) -> Task:
        planned = self._tasks[key].task
        assert planned is not None
        return self._again.get(key, planned)

    def _tell(
        self,
        kind: EventKind,
        task: Task | None,
        *,
        report: Mapping[str, Any] | None = None,
        error: str | None = None,
        record: Record | None = None,
    ) -> None:
        counts = {"done": self._total - len(self._tasks), "total": self._total}
        event = Event(
            kind=kind, task=task, report=report or {}, error=error, record=record, **counts
        )
        self._on_event(event)

    # --- the plan ----------------------------------------------------------------------------

    def _plan_if_due(self, *, hungry: bool, last: bool = False) -> bool:
        """Plan anew if records may have decided more, seldom enough to cost little; say if so.

        hungry: whether somebody asks for work in vain: then up to half of the time may go into it.
        last: whether nothing else is left to do.
        """
        if self._clock() < self._plan_after:
            return False
        since = self._clock() - self._planned_at
        share = _HUNGRY_SHARE if hungry else _PLANNING_SHARE
        waited = bool(self._ended_since) and since >= _PLAN_EVERY_S
        due = last or (since >= self._planning_s / share and (self._stale or waited))
        return due and self._plan_again()

    def _plan_again(self) -> bool:
        """Plan anew; False: the storage does not answer, and is asked again in a moment."""
        ended = self._ended_since
        try:
            self.plan = self._new_plan()
        except StorageError as error:
            self._ended_since, self._stale = ended, True
            self._plan_after = self._clock() + _PAUSE_S
            logger.warning("the plan waits for the storage: %s", error)
            return False
        self._take_over()
        return True

    def _new_plan(self) -> Plan:
        began = self._clock()
        changed, self._ended_since = self._ended_since, set()
        plan = self._planner.plan(self._records, failed=self._failed, changed=changed)
        self._planned_at = self._clock()
        self._planning_s = self._planned_at - began
        self._stale = False
        for known in plan.tasks:  # what a race lets go on may be in the store already
            if known.state == "cached" and not self._is_ours(known.key):
                self._cached[known.key] = None
        return plan

    def _is_ours(self, key: str) -> bool:
        return key in self._done or key in self._running

    def _take_over(self) -> None:
        """Give the scheduler the tasks of the plan that are open, and to be done.

        What runs ends, whether the plan still has it or not.
        """
        plan = self.plan
        planned = (task.key for task in plan.tasks)  # merged shards are in no plan any more
        self._total = len({*planned, *self._running, *self._done, *self._cached})
        running = {key: self._tasks[key] for key in self._running}
        tasks = {task.key: task for task in plan.tasks if task.state != "cached"}
        self._tasks = {**running, **tasks}
        wanted = self._wanted(plan)
        jobs = self._jobs.open_jobs(plan, self._failed)
        listed = [job for job in jobs if wanted is None or job.key in wanted]
        again = self._jobs_tried_again()
        self._stale |= self._scheduler.update(
            (again.get(job.key, job) for job in listed), self._records.__contains__
        )

    def _jobs_tried_again(self) -> dict[str, Job]:
        tasks = self._tasks
        return {
            key: self._jobs.job(replace(tasks[key], task=task))
            for key, task in self._again.items()
            if key in tasks
        }

    def _wanted(self, plan: Plan) -> Collection[str] | None:
        return None if self._only is None else self._only.tasks_of(plan)
