"""A plan as the scheduler sees it: each unfinished task with its expected time."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Final

from dipgo_core.errors import StoreError
from orchestrator.efforts import Effort, Efforts
from orchestrator.estimates import Estimates, Sample
from orchestrator.facts import ModelFacts
from orchestrator.planned import Plan, PlannedTask
from orchestrator.records import Pool, Record, TaskKind
from orchestrator.resources import resources_of
from orchestrator.scheduler import Job
from orchestrator.sweep_settings import ResourceKind, SweepFile

logger = logging.getLogger(__name__)

#: Records read of one kind of work and model to learn its times; more tell little more.
SAMPLES: Final = 24
#: Records of the store that are looked at, if this sweep has none of some kind of work.
OTHERS: Final = 100

#: Whose resources a task takes that is not known yet.
_PLACEHOLDERS: Final[Mapping[TaskKind, ResourceKind]] = {
    "reference": "score", "images": "evaluate", "statistics": "evaluate", "errors": "search",
    "search": "search", "evaluate": "score", "latency": "latency", "race": "score",
}  # fmt: skip

#: Kinds whose worker holds a model's pipeline; that of latencies in a process of its own.
_LOADING: Final[frozenset[TaskKind]] = frozenset(
    {"reference", "images", "errors", "search", "latency"}
)


class Jobs:
    """Turns planned tasks into jobs; what was worked out once is kept while a task is open."""

    def __init__(self, sweep: SweepFile, facts: Mapping[str, ModelFacts], device: str = "") -> None:
        self._sweep = sweep
        self._facts = facts
        self.efforts = Efforts(sweep, facts)
        self.estimates = Estimates(device=device)
        self._known: dict[str, Job] = {}
        self._fitted = 0

    def learn(self, record: Record) -> None:
        """Learn times and block graphs from a record; one of another shape teaches nothing."""
        try:
            if record.kind == "reference":
                self.efforts.learn(record)
            self.estimates.add(Sample.of_record(record, self.efforts))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logger.debug("%s %s tells no times: %r", record.kind, record.key[:12], error)

    def learn_from(self, plan: Plan, records: Mapping[str, Record]) -> None:
        """Learn from a sample of what a sweep has done, and from others in the store if need be."""
        done = sampled(plan)
        keys = {planned.key for planned in done}
        left = {planned.kind for planned in plan.tasks if planned.state != "cached"}
        if left - {planned.kind for planned in done}:  # another sweep may have done such tasks
            keys.update(islice(records, OTHERS))
        known = (_readable(records, key) for key in keys)
        found = [record for record in known if record is not None]
        for record in sorted(found, key=_by_kind_and_time):
            self.learn(record)

    def open_jobs(self, plan: Plan, closed: Collection[str]) -> list[Job]:
        """Return the jobs of all tasks without a record that are not closed (failed for good)."""
        if len(self.estimates) >= 2 * self._fitted:  # what is known has doubled: estimate anew
            self._known.clear()
            self._fitted = max(1, len(self.estimates))
        tasks = (t for t in plan.tasks if t.state != "cached" and t.key not in closed)
        self._known = {task.key: self._kept(task) or self.job(task) for task in tasks}
        return list(self._known.values())

    def _kept(self, planned: PlannedTask) -> Job | None:
        job = self._known.get(planned.key)
        return job if job is not None and job.needs == planned.needs else None

    def job(self, planned: PlannedTask) -> Job:
        effort = self.effort(planned)
        task = planned.task
        model = effort.model if task is None else task.affinity
        loads = planned.kind in _LOADING
        return Job(
            key=planned.key,
            needs=planned.needs,
            seconds=self.estimates.seconds(effort),
            pool=self.pool(planned),
            affinity=model if loads else "",
            load_s=self.estimates.load_s(model, apart=planned.kind == "latency") if loads else 0.0,
            runnable=task is not None,
        )

    def effort(self, planned: PlannedTask) -> Effort:
        return self.efforts.of_task(planned, gpu=self.pool(planned).gpus > 0)

    def pool(self, planned: PlannedTask) -> Pool:
        """Return what a task occupies, also of one that is not known yet."""
        if planned.task is not None:
            return planned.task.pool
        kind = _PLACEHOLDERS.get(planned.kind, "score")
        asked = resources_of(self._sweep, kind, self._facts[planned.model])
        return Pool(asked.cpus, asked.gpus, asked.accelerator, planned.kind == "latency")

    def setting(self, planned: PlannedTask) -> str:
        """Return which part of the sweep file says what a task occupies."""
        shard = planned.task if planned.kind == "images" else None
        dense = shard is not None and "keep" not in shard.inputs
        return f"resources.{'reference' if dense else _PLACEHOLDERS.get(planned.kind, 'score')}"


def _readable(records: Mapping[str, Record], key: str) -> Record | None:
    """Return a record, None for a damaged one: whoever needs what it tells will say so."""
    try:
        return records[key]
    except (KeyError, StoreError) as error:
        logger.debug("no times from record %s: %s", key[:12], error)
        return None


def _by_kind_and_time(record: Record) -> tuple[bool, float]:
    """References first: others are sized by their block graphs."""
    return record.kind != "reference", record.timings.get("finished", 0.0)


def sampled(plan: Plan) -> list[PlannedTask]:
    """Return some of the tasks that are done, of every kind and model."""
    by_kind: dict[tuple[str, str], list[PlannedTask]] = {}
    for planned in plan.tasks:
        if planned.state == "cached":
            by_kind.setdefault((planned.model, planned.kind), []).append(planned)
    return [t for done in by_kind.values() for t in done[:: math.ceil(len(done) / SAMPLES)]]
