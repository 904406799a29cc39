"""The executor on Ray: the driver's loop between a source of tasks and the lanes that do them."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray

from dipgo_core.errors import StoreError, TaskError
from orchestrator.executors.base import RunTask, TaskSource, local_device
from orchestrator.executors.nowhere import Nowhere, refuse_unplaceable
from orchestrator.executors.placement import (
    NODE,
    Bundle,
    Node,
    bundle_of,
    declares_nodes,
    latency_nodes,
    most_common,
    narrowed,
    undeclared,
)
from orchestrator.executors.ray_tune.connect import (
    connect,
    quiet_environment,
    refuse_client,
    start_local,
)
from orchestrator.executors.ray_tune.desk import Asking, Progress, open_desk
from orchestrator.executors.ray_tune.lanes import Ended, Lanes
from orchestrator.executors.ray_tune.nodes import (
    Cluster,
    address_in,
    autoscaled,
    check_storage,
    class_of_loss,
    device_names,
    lost_lane,
    probe_problem,
    working_nodes,
)
from orchestrator.executors.roster import Roster, Worker
from orchestrator.failures import UNCOUNTED, Failure
from orchestrator.records import Pool, Record, Task
from orchestrator.store import Store
from orchestrator.store.probe import drop_probe, write_probe
from orchestrator.sweep_settings import TaskResources

logger = logging.getLogger(__name__)

_LISTEN_S = 0.5
_ANSWER_S = 60.0
#: Lanes that end before they ask for work, one after another, before the run is given up, or if
#: others work, before that is told.
_FALSE_STARTS = 5
#: New lanes wait after one that did not start, longer from time to time.
_START_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 32.0


class RayTuneExecutor:
    """Runs tasks on a Ray cluster, a local one unless an address is given.

    address: of a running cluster; None: RAY_ADDRESS of the environment, else a local one.
    num_cpus: worker slots of a local cluster, more if a task takes more; None: one a CPU.
    insecure: take a cluster that other machines reach and that asks nobody for a token.

    Raises:
        ConfigError: an address of Ray Client.
    """

    def __init__(
        self, address: str | None = None, num_cpus: int | None = None, *, insecure: bool = False
    ) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        if self.address is not None:
            refuse_client(self.address)
        self.num_cpus = num_cpus
        self.insecure = insecure
        self._entered = ExitStack()
        self._connected = self._is_local = False
        self._latency_needs: Bundle = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cluster, or stop the one that was started here."""
        self._connected = self._is_local = False
        self._entered.close()

    def latency_device(self, resources: TaskResources) -> str:
        """Ask the cluster's nodes; latency tasks go to those of one device from now on.

        Raises:
            TaskError: no node fits, or none answers.
        """
        if self.address is None and not ray.is_initialized():
            return local_device(resources)  # of the cluster that `run` will start here
        self._connect()
        nodes = latency_nodes(ray.nodes(), resources)
        devices = device_names(nodes, "cuda" if resources.gpus else "cpu")
        device = most_common(list(devices.values()))
        self._latency_needs = narrowed(nodes, devices, device)
        return device

    def run(self, source: TaskSource, run_task: RunTask, store: Store) -> None:
        """Run tasks until the source is finished.

        Raises:
            StoreError: a node does not see the storage that the driver sees.
            TaskError: the cluster is lost, its workers do not start, or no node holds what is left.
        """
        if source.finished:
            return
        self._connect(max((pool.cpus for pool in source.pools()), default=1.0))
        cluster, desk, probe = Cluster(), open_desk(), write_probe(store)
        by_node = declares_nodes(cluster.nodes())

        def bundle(pool: Pool) -> Bundle:
            return bundle_of(pool, cluster.nodes(), self._latency_needs, by_node=by_node)

        if self._is_local:
            refuse_unplaceable(source.pools(), bundle, cluster.nodes())
        starts = (os.cpu_count() or 1) if self._is_local else sys.maxsize
        lanes, roster = Lanes(desk, run_task, store, probe), Roster(bundle, starts=starts)
        floor = Floor(source, store, desk, lanes, cluster, roster, by_node=by_node)
        floor.adapt()  # workers start while the nodes are asked what they see
        with lanes:
            try:
                check_storage(store, probe, working_nodes(cluster.nodes()))
                while not source.finished:
                    floor.step()
            finally:
                desk.close.remote()
                with suppress(StoreError):  # it is collected later; how the run ended counts
                    drop_probe(store, probe)

    def _connect(self, cpus: float = 1.0) -> None:
        """Connect to the cluster, once; what is there already is used, and left as it is.

        cpus: of the largest task, which a cluster that is started here has room for if it can.
        """
        if self._connected:
            return
        self._entered.enter_context(quiet_environment())
        if not ray.is_initialized():
            self._entered.callback(ray.shutdown)
            if self.address is None:
                self._is_local = True
                start_local(_slots_for(self.num_cpus, cpus))
            else:
                connect(self.address, insecure=self.insecure)
        self._connected = True


def _slots_for(num_cpus: int | None, cpus: float) -> int | None:
    """Return how many slots a cluster of this machine has."""
    if num_cpus is None:
        return None
    return max(num_cpus, min(math.ceil(cpus), os.cpu_count() or 1))


@dataclass(eq=False)
class Floor:
    """One run as it goes on: hears what lanes say, and gives them work.

    by_node: whether all nodes declared themselves when it began, as `bundle_of` takes it.
    """

    source: TaskSource
    store: Store
    desk: Any
    lanes: Lanes
    cluster: Cluster
    roster: Roster
    by_node: bool = True
    false_starts: int = 0
    start_after: float = 0.0
    warned: set[str] = field(default_factory=set)
    nowhere: Nowhere = field(init=False)

    def __post_init__(self) -> None:
        self.nowhere = Nowhere(self.roster.bundle_of, lambda: autoscaled(self.cluster.nodes()))

    def step(self) -> None:
        """Hear what happened, within `_LISTEN_S`, and act on it."""
        self.source.tick()
        self.cluster.nodes()
        for event in self._heard():
            if isinstance(event, Progress):
                self.source.progress(event.key, event.report)
            else:
                self._asked(event)
        for ended in self.lanes.ended():
            self._ended(ended)
        self._hand_out()
        self.adapt()

    def _heard(self) -> list[Any]:
        try:
            found: list[Any] = ray.get(self.desk.events.remote(_LISTEN_S), timeout=_ANSWER_S)
        except ray.exceptions.RayError as error:
            raise TaskError(
                f"this machine's part of the Ray cluster is lost ({error}); finished tasks are in "
                "the store, run the sweep again to go on"
            ) from error
        return found

    def _asked(self, asking: Asking) -> None:
        """A lane is free: what it did is passed on, and it waits for more."""
        worker = self.roster.workers.get(asking.lane)
        if worker is None or worker.state == "leaving":  # it was given up, or nobody needs it
            self._send({asking.lane: None})
            return
        task = worker.task
        worker.held = asking.held
        worker.turn("waiting", time.monotonic())
        if not worker.node:
            self._welcome(worker, asking)
        if isinstance(asking.result, Record):
            self.source.done(asking.result)
        elif isinstance(asking.result, Failure) and task is not None:
            self.source.failed(task.key, asking.result)

    def _welcome(self, worker: Worker, asking: Asking) -> None:
        """A lane asks for the first time: it gets work only if its node sees the storage."""
        worker.node, worker.host = asking.node, asking.host
        self.false_starts = 0
        problem = asking.problem or probe_problem(self.store, asking.written)
        if problem is None:
            return
        worker.turn("barred", worker.since)
        if asking.node not in self.warned:
            self.warned.add(asking.node)
            logger.warning("node %s gets no work: %s", asking.host, problem)

    def _ended(self, ended: Ended) -> None:
        worker = self.roster.workers.pop(ended.lane, None)
        if worker is None:
            return
        if worker.task is not None:
            error = ended.error or TaskError("the worker went home before its task was done")
            seconds = time.monotonic() - worker.since
            alive = self.cluster.is_alive(worker.node)
            failure = lost_lane(
                error, worker.task, node_alive=alive, host=worker.host, seconds=seconds
            )
            self.source.failed(worker.task.key, failure)
        elif not worker.node and ended.error is not None:
            self._false_start(ended.error)

    def _false_start(self, error: BaseException) -> None:
        """A worker died before it asked for work; nothing is lost, and others are tried.

        One whose node is gone tells nothing of the others.

        Raises:
            TaskError: several in a row, and nobody works.
        """
        address = address_in(error)
        there = {node["NodeManagerAddress"]: node["NodeID"] for node in self.cluster.nodes()}
        alive = not address or (address in there and self.cluster.is_alive(there[address]))
        if class_of_loss(error, node_alive=alive) in UNCOUNTED:
            return
        self.false_starts += 1
        rounds = self.false_starts // _FALSE_STARTS
        pause = min(_LONGEST_PAUSE_S, _START_PAUSE_S * 2.0 ** min(rounds, 16))
        self.start_after = time.monotonic() + pause
        if not self.false_starts % _FALSE_STARTS:
            self._tell_false_starts(error, address)

    def _tell_false_starts(self, error: BaseException, address: str) -> None:
        told = (
            f"{self.false_starts} workers in a row did not start, the last one"
            f"{f' on node {address}' if address else ''} with: {error}\n"
            "Is dipgo-sweep installed on all nodes, in this version?"
        )
        if not any(each.state in ("working", "waiting") for each in self.roster.workers.values()):
            raise TaskError(told) from error
        logger.warning("%s\nThe others go on", told)

    def _hand_out(self) -> None:
        orders: dict[str, Task | None] = {}
        for name, worker in self.roster.waiting():
            task = self.source.next_ready(worker.lane)
            if task is None:
                continue
            orders[name] = task
            worker.turn("working", time.monotonic(), task)
            self.source.started(task.key, worker.host)
        self._send(orders)

    def adapt(self) -> None:
        """Open lanes for tasks that nobody takes, and send home those that nobody needs."""
        demand, now = self.source.demand(), time.monotonic()
        nodes: Sequence[Node] = self.cluster.nodes()
        self._look_for_room(demand, nodes, now)
        retiring = self.roster.retiring(demand, nodes, now)
        for name in retiring:
            self.roster.workers[name].turn("leaving", now)
        self._send(dict.fromkeys(retiring))
        for name in self.roster.in_vain(demand, nodes, now):
            self.roster.workers[name].turn("leaving", now)
            self.lanes.take_back(name)
        if now >= self.start_after:
            for pool in self.roster.missing(demand, nodes):
                self.lanes.open(self.roster.open(pool, now), self.roster.bundle_of(pool))

    def _look_for_room(self, demand: Mapping[Pool, int], nodes: Sequence[Node], now: float) -> None:
        """Tell of tasks that fit nowhere, and of nodes that get no work for want of `NODE`."""
        lost = self.nowhere.look(demand, nodes, now)
        self.source.set_aside(lost)
        works = any(each.state == "working" for each in self.roster.workers.values())
        stuck = bool(demand) and lost.issuperset(demand) and not works
        self.nowhere.tell(self.source.pools, nodes, now, stuck=stuck)
        for address in set(undeclared(nodes)) - self.warned if self.by_node else ():
            self.warned.add(address)
            logger.warning(
                "node %s gets no work: it lacks the resource that the others have; start it with "
                "--resources='{\"%s\": 1}'",
                address,
                NODE,
            )

    def _send(self, orders: dict[str, Task | None]) -> None:
        if orders:
            self.desk.answer.remote(orders)
