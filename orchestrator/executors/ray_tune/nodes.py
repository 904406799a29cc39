"""What the nodes of a cluster are and say: their devices, the storage they see, who is lost."""

from __future__ import annotations

import logging
import re
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dipgo_core.errors import StoreError, TaskError
from dipgo_core.evaluation.device import device_name
from orchestrator.executors.placement import Node
from orchestrator.failures import Failure, FailureClass, can_be_halved, one_line
from orchestrator.records import Task
from orchestrator.store import Store
from orchestrator.store.probe import drop_probe, echo_probe, read_probe

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 180.0
_NODES_EVERY_S = 2.0
_HEAD_TRIES_EVERY_S = 1.0
_NODE_ANSWERS_S = 2.0
#: A head that answers nobody for this long is lost.
HEAD_LOST_S = 20.0
#: A label that Ray gives to nodes that belong to a group of an autoscaler.
_NODE_GROUP = "ray.io/node-group"
#: How Ray's errors name a node: "ip: 10.0.0.7", "ip=10.0.0.7".
_ADDRESS = re.compile(r"\bip[:=] ?([0-9a-fA-F.:]*[0-9a-fA-F])")
#: How Ray's memory monitor says that it ended a worker (its text is all there is).
_MEMORY = ("NODE_OUT_OF_MEMORY", "running low on memory", "OutOfMemoryError")


def working_nodes(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes that are alive and run workers."""
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]


def ask_nodes(nodes: Sequence[Node], question: Callable[..., Any], *told: Any) -> dict[str, Any]:
    """Return what `question` says on each node, by node id; an error is an answer too."""
    asked = ray.remote(question)
    answers = {
        node["NodeID"]: asked.options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(*told)
        for node in nodes
    }
    ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_SECONDS)
    return {name: _answer(future) for name, future in answers.items()}


def _answer(future: Any) -> Any:
    try:
        return ray.get(future, timeout=0.1)
    except ray.exceptions.RayTaskError as error:
        return error.cause or TaskError(str(error))
    except ray.exceptions.RayError as error:
        return error


def device_names(nodes: Sequence[Node], kind: str) -> dict[str, str]:
    """Return the name of each node's device, by node id.

    Raises:
        TaskError: a node does not answer.
    """
    found = ask_nodes(nodes, device_name, kind)
    for node in nodes:
        answer = found[node["NodeID"]]
        if isinstance(answer, Exception):
            raise TaskError(
                f"node {node['NodeManagerAddress']} does not say which device it has: {answer}\nIs "
                "dipgo-sweep installed on all nodes, in this version?"
            ) from answer
    return found


def check_storage(store: Store, probe: str, nodes: Sequence[Node]) -> None:
    """Let every node read the driver's probe in the store, and read what each writes.

    Nodes that do not answer at all, for instance because they are on their way out, refuse nothing:
    should one of them start a lane after all, that lane reads the probe before it works.

    Raises:
        StoreError: nodes that do not see the storage that the driver sees; each is named.
    """
    problems = []
    for name, answer in ask_nodes(nodes, echo_probe, store, probe).items():
        address = next(node["NodeManagerAddress"] for node in nodes if node["NodeID"] == name)
        if isinstance(answer, ray.exceptions.RayError):
            logger.warning("node %s does not answer: %s", address, one_line(str(answer)))
            continue
        problem = probe_problem(store, answer)
        if problem is not None:
            problems.append(f"  node {address}: {problem}")
    if problems:
        raise StoreError(
            f"storage {store.url} is not the same on every node of the cluster:\n"
            + "\n".join(problems)
            + "\nUse a folder on a file system that all nodes mount at this path, or s3://"
        )


def probe_problem(store: Store, answer: str | Exception | None) -> str | None:
    """Return why a node cannot be given work. answer: the probe it wrote, or its error."""
    if not isinstance(answer, str):
        return one_line(f"it cannot read what the driver writes: {answer}")
    try:
        read_probe(store, answer)
        drop_probe(store, answer)
    except StoreError as error:
        return one_line(f"the driver cannot read what it writes: {error}")
    return None


class Cluster:
    """The cluster's nodes, looked up every few seconds, and whether its head is there."""

    def __init__(self) -> None:
        host, port = ray.get_runtime_context().gcs_address.rsplit(":", 1)
        self._head = (host.strip("[]"), int(port))
        self._nodes: list[Node] = []
        self._looked = self._tried = float("-inf")
        self._answered = time.monotonic()

    def nodes(self) -> list[Node]:
        """Return the nodes that are alive.

        Raises:
            TaskError: the head has not answered for `HEAD_LOST_S`.
        """
        now = time.monotonic()
        if now - self._tried >= _HEAD_TRIES_EVERY_S:
            self._tried = now
            self._knock()
        if self._answered >= self._tried and now - self._looked >= _NODES_EVERY_S:
            self._looked = now
            self._nodes = [node for node in ray.nodes() if node["Alive"]]
        return self._nodes

    def is_alive(self, node: str) -> bool:
        """Find out now whether a node is still there.

        The head needs up to half a minute to notice that one is not, so the node itself is asked.
        """
        known = next((each for each in self._nodes if each["NodeID"] == node), None)
        if known is None:
            return False
        try:
            place = (known["NodeManagerAddress"], known["NodeManagerPort"])
            socket.create_connection(place, timeout=_NODE_ANSWERS_S).close()
        except OSError:
            return False
        return True

    def _knock(self) -> None:
        """Try to reach the head; a plain connection, for Ray's own calls wait a minute for it."""
        try:
            socket.create_connection(self._head, timeout=1.0).close()
            self._answered = time.monotonic()
        except OSError as error:
            silent = time.monotonic() - self._answered
            if silent > HEAD_LOST_S:
                raise TaskError(
                    f"the head of the Ray cluster ({self._head[0]}:{self._head[1]}) has not "
                    f"answered for {silent:.0f} s ({error}). What is finished is in the store: "
                    "start the cluster again, then run the sweep again to go on"
                ) from error


def autoscaled(nodes: Sequence[Node]) -> bool:
    """Say whether an autoscaler may add nodes: it has named the group of those that are there."""
    return any(_NODE_GROUP in node.get("Labels", {}) for node in nodes)


def lost_lane(
    error: BaseException, task: Task, *, node_alive: bool, host: str, seconds: float
) -> Failure:
    """Return the failure of a task whose lane ended before the task did.

    A node without memory ends whom it likes: a task that asks for no less another time is a worker
    that was lost.
    """
    kind = class_of_loss(error, node_alive=node_alive)
    if kind == "out_of_memory" and not can_be_halved(task):
        kind = "worker_lost"
    return Failure(
        kind=kind,
        error=one_line(f"{type(error).__name__}: {error}"),
        host=host,
        seconds=seconds,
    )


def class_of_loss(error: BaseException, *, node_alive: bool) -> FailureClass:
    """Return why a lane ended, by what Ray says of it."""
    if getattr(error, "preempted", False):
        return "preempted"
    if any(sign in f"{type(error).__name__} {error}" for sign in _MEMORY):
        return "out_of_memory"
    return "worker_lost" if node_alive else "node_lost"


def address_in(error: BaseException) -> str:
    """Return the address of the node that Ray's error names, "" where it names none."""
    found = _ADDRESS.search(str(error))
    return found[1] if found else ""


def addresses(nodes: Sequence[Node]) -> Mapping[str, str]:
    """Return the address of each node, by node id."""
    return {node["NodeID"]: str(node["NodeManagerAddress"]) for node in nodes}
