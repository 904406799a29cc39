"""Scheduler: which ready task a worker is given. Pure; the driver and the simulation both use it.

A task's rank is the expected time from its start to the end of the sweep along the longest path
through what needs it, so whatever holds up most comes first. A worker that does not hold a task's
pipeline would load it first: that time counts against the task.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.executors.base import Lane
from orchestrator.records import Pool

JobState = Literal["waiting", "ready", "delayed", "running"]
Heap = list[tuple[float, int, str]]  # minus rank, order of arrival, key


@dataclass(frozen=True, slots=True)
class Job:
    """A task as the scheduler sees it.

    needs: keys that must be finished first. seconds: expected. load_s: expected for the pipeline,
    on a worker that does not hold it. runnable: False for a placeholder, which counts in the ranks
    of what it needs but is never handed out.
    """

    key: str
    needs: tuple[str, ...]
    seconds: float
    pool: Pool
    affinity: str = ""
    load_s: float = 0.0
    runnable: bool = True


class _Node:
    """A job in the graph. waiting: needs that are not finished."""

    __slots__ = ("job", "order", "rank", "state", "waiting")

    def __init__(self, job: Job, order: int) -> None:
        self.job = job
        self.order = order
        self.rank = job.seconds
        self.state: JobState = "waiting"
        self.waiting: set[str] = set()


class Scheduler:
    """The unfinished tasks of a sweep as a graph; every event costs what it changes, not more."""

    def __init__(self) -> None:
        self._nodes: dict[str, _Node] = {}
        self._dependents: dict[str, set[str]] = {}
        self._ready: dict[Pool, dict[str, Heap]] = defaultdict(lambda: defaultdict(list))
        self._count: Counter[Pool] = Counter()
        self._delayed: list[tuple[float, str]] = []
        self._running = 0
        self._arrivals = 0
        #: Pools that no node holds: what must be alone does not wait for them.
        self.set_aside: Collection[Pool] = frozenset()
        self._last = ""  # affinity that was handed out last, for whoever asks without a lane

    def __len__(self) -> int:
        """How many tasks are not finished, placeholders among them."""
        return len(self._nodes)

    @property
    def idle(self) -> bool:
        """Whether nothing runs, is ready, or waits to be tried again."""
        return not (self._running or self._count.total() or self._delayed)

    @property
    def running(self) -> int:
        return self._running

    def rank(self, key: str) -> float:
        return self._nodes[key].rank

    def update(self, jobs: Iterable[Job], met: Callable[[str], bool]) -> bool:
        """Make these the unfinished jobs; return whether a placeholder waits for nothing any more.

        met: whether a key is finished. Jobs that run stay until they end, whether listed or not.
        """
        listed = {job.key: job for job in jobs}
        known = self._nodes
        gone = [k for k, node in known.items() if k not in listed and node.state != "running"]
        new = [job for key, job in listed.items() if key not in known or known[key].job != job]
        touched = set[str]()
        for key in gone:
            touched.update(self._unlink(key))
        for job in new:
            touched.add(job.key)
            touched.update(self._link(job, met))
        self._rank_again(touched)
        return any(self._make_ready(job.key) for job in new)

    def take(self, lane: Lane | None, now: float) -> str | None:
        """Hand out the key of a ready job, the one that is best for this lane; None: any pool."""
        self._release(now)
        held = (self._last,) if lane is None else lane.held
        best = max(self._offers(lane), key=lambda node: _score(node, held), default=None)
        if best is None:
            return None
        self._count[best.job.pool] -= 1
        heapq.heappop(self._ready[best.job.pool][best.job.affinity])
        best.state = "running"
        self._running += 1
        self._last = best.job.affinity
        return best.job.key

    def demand(self, now: float) -> Mapping[Pool, int]:
        """Return how many jobs could be handed out now, by pool."""
        self._release(now)
        return {pool: self._count[pool] for pool in self._open_pools()}

    def finish(self, key: str) -> bool:
        """Note that a job is done; return whether a placeholder waits for nothing any more."""
        dependents = self._dependents.get(key, set())
        self._end(key)
        resolvable = False
        for dependent in sorted(dependents):
            self._nodes[dependent].waiting.discard(key)
            resolvable |= self._make_ready(dependent)
        self._dependents.pop(key, None)
        return resolvable

    def give_up(self, key: str) -> None:
        """Note that a running job failed for good: what needs it stays waiting."""
        self._end(key)

    def put_back(self, key: str, job: Job, at: float) -> None:
        """Note that a running job is to be tried again, as `job`, not before `at`."""
        node = self._nodes[key]
        node.job, node.state = job, "delayed"
        self._running -= 1
        heapq.heappush(self._delayed, (at, key))

    def _end(self, key: str) -> None:
        node = self._nodes.get(key)
        if node is None:
            return
        self._running -= node.state == "running"
        self._rank_again(self._unlink(key))

    def _link(self, job: Job, met: Callable[[str], bool]) -> tuple[str, ...]:
        """Add a job, or put another one in its place; return the keys whose rank may change."""
        node = self._nodes.get(job.key)
        if node is not None:
            touched = self._replace(node, job)
        else:
            self._arrivals += 1
            node = self._nodes[job.key] = _Node(job, self._arrivals)
            touched = ()
        node.waiting = {need for need in job.needs if not met(need)}
        for need in node.waiting:
            self._dependents.setdefault(need, set()).add(job.key)
        return (*touched, *node.waiting)

    def _replace(self, node: _Node, job: Job) -> tuple[str, ...]:
        touched = tuple(node.waiting)
        for need in touched:
            self._dependents[need].discard(job.key)
        if node.state == "ready":
            self._count[node.job.pool] -= 1
            node.state = "waiting"
        node.job = job
        return touched

    def _unlink(self, key: str) -> tuple[str, ...]:
        """Forget a job; return the keys of what it needed."""
        node = self._nodes.pop(key)
        if node.state == "ready":
            self._count[node.job.pool] -= 1
        for need in node.waiting:
            if need in self._dependents:
                self._dependents[need].discard(key)
        return tuple(node.waiting)

    def _rank_again(self, keys: Iterable[str]) -> None:
        """Work ranks out anew of these jobs and of whatever they need, each once, last ones first.

        (Keys that are no jobs are ignored.)
        """
        affected = self._with_needs(keys)
        above = {key: self._dependents.get(key, set()) & affected for key in affected}
        left = {key: len(dependents) for key, dependents in above.items()}
        turn = [key for key, count in left.items() if not count]
        while turn:
            node = self._nodes[turn.pop()]
            self._set_rank(node)
            for need in node.waiting & affected:
                left[need] -= 1
                if not left[need]:
                    turn.append(need)

    def _with_needs(self, keys: Iterable[str]) -> set[str]:
        found = set[str]()
        stack = [key for key in keys if key in self._nodes]
        while stack:
            key = stack.pop()
            if key not in found:
                found.add(key)
                stack += (need for need in self._nodes[key].waiting if need in self._nodes)
        return found

    def _set_rank(self, node: _Node) -> None:
        after = self._dependents.get(node.job.key, ())
        rank = node.job.seconds + max((self._nodes[k].rank for k in after), default=0.0)
        if rank != node.rank:
            node.rank = rank
            if node.state == "ready":
                self._push(node)

    def _make_ready(self, key: str) -> bool:
        """Queue a job that waits for nothing; return whether it is a placeholder that does."""
        node = self._nodes[key]
        if node.waiting or node.state != "waiting":
            return False
        if not node.job.runnable:
            return True
        node.state = "ready"
        self._count[node.job.pool] += 1
        self._push(node)
        return False

    def _push(self, node: _Node) -> None:
        heap = self._ready[node.job.pool][node.job.affinity]
        heapq.heappush(heap, (-node.rank, node.order, node.job.key))

    def _release(self, now: float) -> None:
        """Make jobs ready whose time to be tried again has come."""
        while self._delayed and self._delayed[0][0] <= now:
            _, key = heapq.heappop(self._delayed)
            node = self._nodes.get(key)
            if node is not None and node.state == "delayed":
                node.state = "waiting"
                self._make_ready(key)

    def _open_pools(self) -> list[Pool]:
        """Return the pools with ready jobs; what must be alone only when nothing else is ready."""
        pools = [pool for pool, count in self._count.items() if count]
        shared = [pool for pool in pools if not pool.exclusive]
        return shared if any(pool not in self.set_aside for pool in shared) else pools

    def _offers(self, lane: Lane | None) -> Iterator[_Node]:
        """Yield the first job of each queue that this lane may take from."""
        for pool in self._open_pools():
            if lane is None or lane.pool == pool:
                heads = (self._head(heap) for heap in self._ready[pool].values())
                yield from (head for head in heads if head is not None)

    def _head(self, heap: Heap) -> _Node | None:
        """Return the first job of a queue, dropping entries that are no longer true."""
        while heap:
            rank, _, key = heap[0]
            node = self._nodes.get(key)
            if node is not None and node.state == "ready" and node.rank == -rank:
                return node
            heapq.heappop(heap)
        return None


def _score(node: _Node, held: tuple[str, ...]) -> tuple[float, int]:
    job = node.job
    load = job.load_s if job.affinity and job.affinity not in held else 0.0
    return node.rank - load, -node.order
