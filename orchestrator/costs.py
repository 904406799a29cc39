"""What is left of a sweep will cost: hours by kind of work, dollars, wall time, and the budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from orchestrator.jobs import Jobs
from orchestrator.planned import Plan, PlannedTask
from orchestrator.records import TaskKind
from orchestrator.simulate import Cluster, Forecast, simulate
from orchestrator.sweep_settings import Budget


@dataclass(frozen=True, kw_only=True)
class CostRow:
    """All tasks of a kind of one model that are left. basis: where the estimate comes from."""

    model: str
    kind: TaskKind
    tasks: int
    seconds: float
    gpu_hours: float
    cpu_hours: float
    basis: str


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What is left of a sweep, on a cluster. spent_gpu_hours: by its runs so far.

    usd: of both together; None where nobody says what a GPU-hour costs. limited: whether there is a
    budget. beyond: its limits that the sweep would reach, in words.
    """

    rows: tuple[CostRow, ...]
    gpu_hours: float
    cpu_hours: float
    spent_gpu_hours: float
    usd: float | None
    limited: bool
    beyond: tuple[str, ...]
    cluster: Cluster
    forecast: Forecast

    def to_json(self) -> dict[str, Any]:
        return {
            "gpu_hours": self.gpu_hours,
            "cpu_hours": self.cpu_hours,
            "spent_gpu_hours": self.spent_gpu_hours,
            "usd": self.usd,
            "budgeted": self.limited,
            "beyond_budget": list(self.beyond),
            "by_kind": [asdict(row) for row in self.rows],
            "cluster": asdict(self.cluster),
            "simulated": self.forecast.to_json(),
        }


def costs_of(
    plan: Plan, jobs: Jobs, budget: Budget, cluster: Cluster, *, spent_gpu_hours: float
) -> Costs:
    """Estimate what is left of a plan, and simulate it on a cluster.

    cluster: its `startup_s` and `dispatch_s` are those of the records.
    """
    rows = cost_rows(plan, jobs)
    forecast = simulate(jobs.open_jobs(plan, ()), cluster)
    gpu_hours = sum(row.gpu_hours for row in rows)
    total, price = gpu_hours + spent_gpu_hours, budget.usd_per_gpu_hour
    usd = None if price is None else total * price
    return Costs(
        rows=rows,
        gpu_hours=gpu_hours,
        cpu_hours=sum(row.cpu_hours for row in rows),
        spent_gpu_hours=spent_gpu_hours,
        usd=usd,
        limited=any((budget.gpu_hours, budget.wall_hours, budget.usd)),
        beyond=beyond(budget, total, usd, forecast.makespan_s / 3600),
        cluster=cluster,
        forecast=forecast,
    )


def cost_rows(plan: Plan, jobs: Jobs) -> tuple[CostRow, ...]:
    """Return a row for each kind of work of each model that has tasks left."""
    groups: dict[tuple[str, TaskKind], list[PlannedTask]] = {}
    for planned in plan.tasks:
        if planned.state != "cached":
            groups.setdefault((planned.model, planned.kind), []).append(planned)
    return tuple(_row(model, kind, tasks, jobs) for (model, kind), tasks in groups.items())


def _row(model: str, kind: TaskKind, tasks: Sequence[PlannedTask], jobs: Jobs) -> CostRow:
    found = [jobs.job(planned) for planned in tasks]
    bases = dict.fromkeys(jobs.estimates.basis(jobs.effort(planned)) for planned in tasks)
    return CostRow(
        model=model,
        kind=kind,
        tasks=len(tasks),
        seconds=sum(job.seconds for job in found),
        gpu_hours=sum(job.pool.gpus * job.seconds for job in found) / 3600,
        cpu_hours=sum(job.pool.cpus * job.seconds for job in found) / 3600,
        basis="; ".join(bases),
    )


def beyond(
    budget: Budget, gpu_hours: float, usd: float | None, wall_hours: float
) -> tuple[str, ...]:
    """Return the limits of a budget that these figures pass, in words."""
    limits: Mapping[str, tuple[float | None, float | None]] = {
        "GPU-hours": (budget.gpu_hours, gpu_hours),
        "US dollars": (budget.usd, usd),
        "hours of wall time": (budget.wall_hours, wall_hours),
    }
    return tuple(
        f"{value:.3g} of {limit:g} {unit}"
        for unit, (limit, value) in limits.items()
        if limit is not None and value is not None and value > limit
    )
