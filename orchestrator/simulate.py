"""A sweep on a cluster that is not there: the same scheduler on a simulated clock. Pure, no torch.

Workers are lanes: each takes task after task of one pool, pays for starting once, for a pipeline it
does not hold, and for each hand-out. What must be alone gets a node that does nothing else.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.executors.base import Lane
from orchestrator.records import Pool, held_after
from orchestrator.scheduler import Job, Scheduler


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Equal nodes. startup_s: of a worker. dispatch_s: between two tasks of one."""

    nodes: int
    cpus: float
    gpus: float
    startup_s: float = 0.0
    dispatch_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a simulated run came to. Times in seconds; busy: of workers with tasks, by GPUs held.

    utilisation: of the GPUs, or of the CPUs where no task takes a GPU: time in tasks, loading
    apart, by the time there is until the end. unplaced: tasks that fit on no node.
    """

    makespan_s: float
    utilisation: float
    gpu_hours: float
    cpu_hours: float
    tasks: int
    workers: int
    unplaced: int

    def to_json(self) -> dict[str, Any]:
        return {
            "makespan_s": round(self.makespan_s, 3),
            "utilisation": round(self.utilisation, 4),
            "gpu_hours": round(self.gpu_hours, 6),
            "cpu_hours": round(self.cpu_hours, 6),
            "tasks": self.tasks,
            "workers": self.workers,
            "unplaced": self.unplaced,
        }


@dataclass
class _Node:
    cpus: float
    gpus: float
    whole: tuple[float, float]
    lanes: list[_Lane] = field(default_factory=list)

    def fits(self, pool: Pool) -> bool:
        """Whether a worker of this pool could start now, idle ones of others giving way."""
        idle = [lane for lane in self.lanes if lane.key is None]
        if pool.exclusive:
            cpus, gpus = self.whole
            return len(idle) == len(self.lanes) and cpus >= pool.cpus and gpus >= pool.gpus
        if any(lane.pool.exclusive and lane.key is not None for lane in self.lanes):
            return False
        cpus = self.cpus + sum(lane.pool.cpus for lane in idle)
        gpus = self.gpus + sum(lane.pool.gpus for lane in idle)
        return cpus >= pool.cpus - 1e-9 and gpus >= pool.gpus - 1e-9

    def start(self, lane: _Lane) -> None:
        """Place a worker; idle ones leave, last used first, until there is room."""
        pool = lane.pool
        while self.lanes and (
            pool.exclusive or self.cpus < pool.cpus - 1e-9 or self.gpus < pool.gpus - 1e-9
        ):
            self._leave(next(each for each in self.lanes if each.key is None))
        self.cpus -= pool.cpus
        self.gpus -= pool.gpus
        self.lanes.append(lane)

    def _leave(self, lane: _Lane) -> None:
        self.lanes.remove(lane)
        self.cpus += lane.pool.cpus
        self.gpus += lane.pool.gpus


@dataclass(eq=False)
class _Lane:
    pool: Pool
    started: bool = False
    held: tuple[str, ...] = ()
    key: str | None = None


class _Run:
    """One simulated run."""

    def __init__(self, jobs: Iterable[Job], cluster: Cluster) -> None:
        self.cluster = cluster
        self.jobs = {job.key: replace(job, runnable=True) for job in jobs}
        self.scheduler = Scheduler()
        self.scheduler.update(self.jobs.values(), lambda key: key not in self.jobs)
        size = (cluster.cpus, cluster.gpus)
        self.nodes = [_Node(*size, whole=size) for _ in range(cluster.nodes)]
        self.now = 0.0
        self.events: list[tuple[float, int, _Lane]] = []
        self.busy: dict[str, float] = defaultdict(float)
        self.workers = self.count = 0

    def forecast(self) -> Forecast:
        self._assign()
        while self.events:
            self.now, _, lane = heapq.heappop(self.events)
            if lane.key is not None:
                self.scheduler.finish(lane.key)
                lane.key = None
            self._assign()
        gpus = any(job.pool.gpus for job in self.jobs.values())
        there = self.cluster.nodes * (self.cluster.gpus if gpus else self.cluster.cpus)
        used = self.busy["gpu work" if gpus else "cpu work"]
        return Forecast(
            makespan_s=self.now,
            utilisation=used / (there * self.now) if there and self.now else 0.0,
            gpu_hours=self.busy["gpu"] / 3600,
            cpu_hours=self.busy["cpu"] / 3600,
            tasks=self.count,
            workers=self.workers,
            unplaced=len(self.scheduler),
        )

    def _assign(self) -> None:
        """Give every idle worker a task, then start workers for what is left."""
        for node in self.nodes:
            alone = any(lane.pool.exclusive and lane.key for lane in node.lanes)
            for lane in node.lanes:
                if lane.key is None and not alone and not self._waits_for_node(node, lane):
                    self._begin(lane)
        for pool, count in self.scheduler.demand(self.now).items():
            for _ in range(count):
                if not self._start_worker(pool):
                    break

    def _waits_for_node(self, node: _Node, lane: _Lane) -> bool:
        return lane.pool.exclusive and any(other.key for other in node.lanes)

    def _start_worker(self, pool: Pool) -> bool:
        node = next((node for node in self.nodes if node.fits(pool)), None)
        if node is None:
            return False
        lane = _Lane(pool)
        node.start(lane)
        self.workers += 1
        self._begin(lane)
        return True

    def _begin(self, lane: _Lane) -> None:
        key = self.scheduler.take(Lane(lane.pool, lane.held), self.now)
        if key is None:
            return
        job = self.jobs[key]
        load = job.load_s if job.affinity and job.affinity not in lane.held else 0.0
        before = (0.0 if lane.started else self.cluster.startup_s) + self.cluster.dispatch_s
        lane.key, lane.started = key, True
        lane.held = held_after(lane.held, job.affinity, lane.pool)
        self._count(job, load)
        self.count += 1
        heapq.heappush(self.events, (self.now + before + load + job.seconds, self.count, lane))

    def _count(self, job: Job, load: float) -> None:
        self.busy["gpu"] += job.pool.gpus * (job.seconds + load)
        self.busy["cpu"] += job.pool.cpus * (job.seconds + load)
        self.busy["gpu work"] += job.pool.gpus * job.seconds
        self.busy["cpu work"] += job.pool.cpus * job.seconds


def simulate(jobs: Iterable[Job], cluster: Cluster) -> Forecast:
    """Run jobs on a cluster; placeholders count as tasks like any other."""
    return _Run(jobs, cluster).forecast()
