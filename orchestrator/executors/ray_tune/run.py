"""The executor on Ray: the driver's loop between a source of tasks and the lanes that do them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import ray

from dipgo_core.errors import StoreError, TaskError
from orchestrator.executors.base import RunTask, TaskSource, local_device
from orchestrator.executors.placement import (
    Bundle,
    Node,
    bundle_of,
    declares_nodes,
    latency_nodes,
    most_common,
    narrowed,
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
    check_storage,
    device_names,
    lost_lane,
    probe_problem,
    working_nodes,
)
from orchestrator.executors.roster import Roster, Worker
from orchestrator.failures import Failure
from orchestrator.records import Pool, Record, Task
from orchestrator.store import Store
from orchestrator.store.probe import drop_probe, write_probe
from orchestrator.sweep_settings import TaskResources

logger = logging.getLogger(__name__)

_LISTEN_S = 0.5
_ANSWER_S = 60.0
#: Lanes that end before they ask for work, one after another, before the run is given up.
_FALSE_STARTS = 5
_START_PAUSE_S = 2.0


class RayTuneExecutor:
    """Runs tasks on a Ray cluster, a local one unless an address is given.

    address: of a running cluster; None: RAY_ADDRESS of the environment, else a local one.
    num_cpus: worker slots of a local cluster; None: one a CPU. insecure: take a cluster that other
    machines reach and that asks nobody for a token.

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
        self._connected = False
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
        self._connected = False
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
            TaskError: the cluster is lost, or its workers do not start.
        """
        if source.finished:
            return
        self._connect()
        cluster, desk, probe = Cluster(), open_desk(), write_probe(store)
        by_node = declares_nodes(cluster.nodes())

        def bundle(pool: Pool) -> Bundle:
            return bundle_of(pool, cluster.nodes(), self._latency_needs, by_node=by_node)

        lanes = Lanes(desk, run_task, store, probe)
        floor = Floor(
            source, store, desk, lanes, cluster, Roster(bundle, starts=os.cpu_count() or 1)
        )
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

    def _connect(self) -> None:
        """Connect to the cluster, once; what is there already is used, and left as it is."""
        if self._connected:
            return
        self._entered.enter_context(quiet_environment())
        if not ray.is_initialized():
            self._entered.callback(ray.shutdown)
            if self.address is None:
                start_local(self.num_cpus)
            else:
                connect(self.address, insecure=self.insecure)
        self._connected = True


@dataclass(eq=False)
class Floor:
    """One run as it goes on: hears what lanes say, and gives them work."""

    source: TaskSource
    store: Store
    desk: Any
    lanes: Lanes
    cluster: Cluster
    roster: Roster
    false_starts: int = 0
    start_after: float = 0.0
    warned: set[str] = field(default_factory=set)

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
        if worker is None:  # it was out of reach, and so given up
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
        if worker is None or ended.error is None:
            return
        if not worker.node:
            self._false_start(ended.error)
        elif worker.task is not None:
            seconds = time.monotonic() - worker.since
            alive = self.cluster.is_alive(worker.node)
            failure = lost_lane(ended.error, node_alive=alive, host=worker.host, seconds=seconds)
            self.source.failed(worker.task.key, failure)

    def _false_start(self, error: BaseException) -> None:
        """A worker died before it asked for work; nothing is lost, and others are tried.

        Raises:
            TaskError: several in a row.
        """
        self.false_starts += 1
        self.start_after = time.monotonic() + _START_PAUSE_S
        if self.false_starts >= _FALSE_STARTS:
            raise TaskError(
                f"{self.false_starts} workers in a row did not start, the last one with: {error}\n"
                "Is dipgo-sweep installed on all nodes, in this version?"
            ) from error

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
        retiring = self.roster.retiring(demand, nodes, now)
        for name in retiring:
            self.roster.workers[name].turn("leaving", now)
        self._send(dict.fromkeys(retiring))
        for name in self.roster.in_vain(demand, now):
            self.lanes.take_back(name)
        if now >= self.start_after:
            for pool in self.roster.missing(demand, nodes):
                self.lanes.open(self.roster.open(pool, now), self.roster.bundle_of(pool))

    def _send(self, orders: dict[str, Task | None]) -> None:
        if orders:
            self.desk.answer.remote(orders)
