"""Recorded sweeps: a plan and timings as plain data, from which a prediction is made again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypedDict

from orchestrator.efforts import Effort
from orchestrator.estimates import Estimates, Sample
from orchestrator.jobs import Jobs
from orchestrator.planned import Plan
from orchestrator.records import Pool
from orchestrator.scheduler import Job
from orchestrator.simulate import Cluster, simulate


class Recorded(TypedDict):
    """Two sweeps that ran on one machine: one calibrates, the other is predicted from its plan.

    jobs: as `recorded_jobs` gives them. calibration, measured: samples (`Sample.to_json`).
    """

    machine: str
    executor: str
    cluster: dict[str, Any]
    calibration: list[list[Any]]
    jobs: list[dict[str, Any]]
    measured: list[list[Any]]


@dataclass(frozen=True)
class Prediction:
    """Seconds from the start of the first task to the end of the last one."""

    predicted_s: float
    measured_s: float
    deviation: float


def recorded_jobs(plan: Plan, jobs: Jobs) -> list[dict[str, Any]]:
    """Return the open tasks of a plan as data; a task is known by its place in the list."""
    tasks = [task for task in plan.tasks if task.state != "cached"]
    places = {task.key: place for place, task in enumerate(tasks)}
    return [
        {
            "needs": [places[need] for need in task.needs if need in places],
            "effort": jobs.effort(task).to_json(),
            "pool": asdict(jobs.pool(task)),
            "affinity": jobs.job(task).affinity,
        }
        for task in tasks
    ]


def predict(recorded: Recorded) -> Prediction:
    """Simulate the second sweep with the times of the first, and compare with what it took."""
    estimates = Estimates(map(Sample.from_json, recorded["calibration"]))
    cluster = replace(
        Cluster(**recorded["cluster"]),
        startup_s=estimates.startup_s,
        dispatch_s=estimates.dispatch_s,
    )
    jobs = [_job(place, job, estimates) for place, job in enumerate(recorded["jobs"])]
    predicted = simulate(jobs, cluster).makespan_s
    measured = span(list(map(Sample.from_json, recorded["measured"])))
    return Prediction(predicted, measured, predicted / measured - 1)


def span(samples: Sequence[Sample]) -> float:
    """Return the time from the first start, imports included, to the last end."""
    began = min(sample.began - sample.imports for sample in samples)
    return max(sample.finished for sample in samples) - began


def _job(place: int, data: dict[str, Any], estimates: Estimates) -> Job:
    effort = Effort(*data["effort"])
    affinity, pool = data["affinity"], Pool(**data["pool"])
    return Job(
        key=str(place),
        needs=tuple(map(str, data["needs"])),
        seconds=estimates.seconds(effort),
        pool=pool,
        affinity=affinity,
        load_s=estimates.load_s(affinity, apart=pool.exclusive),
    )
