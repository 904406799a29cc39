"""Who works: lanes that start, work and wait, which to open, and which to send home. Pure.

A lane is a long-lived worker of one pool. The driver keeps this list: a lane asks for work, is
given a task or told to retire, and is taken off when it ends, however it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.executors.base import Lane
from orchestrator.executors.placement import Bundle, Node, slots
from orchestrator.records import Pool, Task

#: Lanes asked for beyond what the cluster holds, of each pool: an autoscaler acts on those.
EXTRA_LANES = 8
#: A lane without work is sent home after this long, so that others may have its resources.
IDLE_S = 60.0
#: Lanes that were asked for in vain are taken back after this long, if nobody needs them.
VAIN_S = 10.0


State = Literal["starting", "waiting", "working", "leaving", "barred"]
_THERE: tuple[State, ...] = ("starting", "waiting", "working", "barred")


@dataclass
class Worker:
    """A lane as the driver knows it. node: id, "" until it asked for work for the first time.

    bundle: what it asked the cluster for when it opened, which stays.

    since: when it came into its state, by `time.monotonic`. task: while it works. A barred lane's
    node cannot see the storage: it is given nothing, and keeps others off that node.
    """

    pool: Pool
    since: float
    state: State = "starting"
    node: str = ""
    host: str = ""
    task: Task | None = None
    held: tuple[str, ...] = ()
    bundle: Bundle = field(default_factory=dict)

    def turn(self, state: State, now: float, task: Task | None = None) -> None:
        self.state, self.since, self.task = state, now, task

    @property
    def lane(self) -> Lane:
        return Lane(self.pool, self.held)


@dataclass
class Roster:
    """All lanes of a run. bundle_of: what a lane of a pool asks the cluster for.

    starts: how many lanes a node starts at a time, if that is less than its CPUs. Imports keep a
    CPU busy for seconds: more lanes than CPUs would all come late, fewer let the first ones work.
    """

    bundle_of: Callable[[Pool], Bundle]
    starts: int = sys.maxsize
    workers: dict[str, Worker] = field(default_factory=dict)
    opened: int = 0

    def open(self, pool: Pool, now: float) -> str:
        """Add a lane that is about to start, and return its name."""
        self.opened += 1
        name = f"lane-{self.opened:05d}"
        self.workers[name] = Worker(pool, now, bundle=self.bundle_of(pool))
        return name

    def waiting(self) -> list[tuple[str, Worker]]:
        """Return the lanes that could be given a task, those that waited longest first."""
        free = [(name, each) for name, each in self.workers.items() if each.state == "waiting"]
        return sorted(free, key=lambda row: row[1].since)

    def missing(self, demand: Mapping[Pool, int], nodes: Sequence[Node]) -> list[Pool]:
        """Return the pool of each lane to open: one a ready task, as many as there is room for.

        Once a pool is full a few more wait for room.
        """
        found = []
        left = self._starts_left(nodes)
        for pool, wanted in demand.items():
            lacking = wanted - self._count(pool, "starting", "waiting")
            room = slots(self.bundle_of(pool), nodes) - self._count(pool, *_THERE)
            more = min(lacking, room, left) if room > 0 else min(lacking, room + EXTRA_LANES)
            found += [pool] * max(0, more)
            left -= max(0, more) if room > 0 else 0
        return found

    def retiring(self, demand: Mapping[Pool, int], nodes: Sequence[Node], now: float) -> list[str]:
        """Return the waiting lanes that nobody needs and whose place is needed, or idle for long.

        Lanes of a pool that has work are kept, and so are all while there is room for the others.
        """
        idle = [row for row in self.waiting() if not demand.get(row[1].pool)]
        cramped = self._cramped(demand, nodes)
        for_room = [name for name, each in idle if cramped - {each.pool}]
        if not any(pool.exclusive for pool in cramped):
            for_room = for_room[: sum(demand[pool] for pool in cramped)]
        late = [name for name, each in idle if now - each.since > IDLE_S]
        return sorted({*for_room, *late})

    def in_vain(self, demand: Mapping[Pool, int], nodes: Sequence[Node], now: float) -> list[str]:
        """Return lanes that have not started, and that nobody waits for any more.

        Nor is one waited for that fits nowhere, now that a lane of its pool asks for less.
        """
        starting = [row for row in self.workers.items() if row[1].state == "starting"]
        found = [
            name
            for name, each in starting
            if each.bundle != self.bundle_of(each.pool) and not slots(each.bundle, nodes)
        ]
        for pool in {each.pool for _, each in starting}:
            coming = self._count(pool, "starting", "waiting")
            late = [n for n, each in starting if each.pool == pool and now - each.since > VAIN_S]
            found += late[: max(0, coming - demand.get(pool, 0))]
        return sorted({*found})

    def _starts_left(self, nodes: Sequence[Node]) -> int:
        """Return how many more lanes may start now; those that wait for room do not start."""
        starting = 0
        for pool in {each.pool for each in self.workers.values() if each.state == "starting"}:
            room = slots(self.bundle_of(pool), nodes)
            beyond = max(0, self._count(pool, *_THERE) - room)
            starting += self._count(pool, "starting") - beyond
        able = sum(min(self.starts, max(1, int(_cpus(node)))) for node in nodes)
        return max(1, able) - starting

    def _count(self, pool: Pool, *states: State) -> int:
        return sum(each.pool == pool and each.state in states for each in self.workers.values())

    def _cramped(self, demand: Mapping[Pool, int], nodes: Sequence[Node]) -> set[Pool]:
        """Return the pools with more ready tasks than lanes that wait, and no room for another."""
        used: dict[str, dict[str, float]] = {}
        for each in self.workers.values():
            if each.node:
                taken = used.setdefault(each.node, {})
                for name, asked in each.bundle.items():
                    taken[name] = taken.get(name, 0.0) + asked
        return {
            pool
            for pool, wanted in demand.items()
            if wanted > self._count(pool, "waiting")
            and not slots(self.bundle_of(pool), nodes, used)
        }


def _cpus(node: Node) -> float:
    return float(node["Resources"].get("CPU", 0.0))
