"""Which class of failure a lost lane is, told from what Ray raises."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.failures import next_attempt
from orchestrator.records import Task

pytestmark = pytest.mark.filterwarnings("ignore")

TASK = Task(kind="images", inputs={}, options={"batch_size": 8})
DIED = "The actor died. Worker exit type: SYSTEM_ERROR"
MEMORY = "Worker exit type: NODE_OUT_OF_MEMORY Worker exit detail: the node running low on memory"


def died(text: str = DIED, *, preempted: bool = False) -> Any:
    exceptions = pytest.importorskip("ray").exceptions
    return exceptions.RayActorError(error_msg=text, preempted=preempted)


@pytest.mark.parametrize(
    ("error", "alive", "kind"),
    [
        (lambda: died(), True, "worker_lost"),
        (lambda: died(), False, "node_lost"),
        (lambda: died(preempted=True), False, "preempted"),
        (lambda: died(MEMORY), True, "out_of_memory"),
        (lambda: RuntimeError("of the lane itself"), True, "worker_lost"),
    ],
)
def test_lost_lane_has_the_class_of_its_cause(error: Any, alive: bool, kind: str) -> None:
    from orchestrator.executors.ray_tune.nodes import lost_lane

    failure = lost_lane(error(), TASK, node_alive=alive, host="10.0.0.7", seconds=3.0)
    assert (failure.kind, failure.host, failure.seconds) == (kind, "10.0.0.7", 3.0)
    assert "\n" not in failure.error


HALVED = {"batch_size": 4, "attempts": [{"failure": "out_of_memory"}]}


@pytest.mark.parametrize(
    "task", [Task(kind="evaluate", inputs={}), Task(kind="images", inputs={}, options=HALVED)]
)
def test_bystander_of_a_node_without_memory_is_a_lost_worker(task: Task) -> None:
    from orchestrator.executors.ray_tune.nodes import lost_lane

    failure = lost_lane(died(MEMORY), task, node_alive=True, host="h", seconds=3.0)
    assert failure.kind == "worker_lost"
    assert next_attempt(task, [failure]) is not None


@pytest.mark.parametrize(
    ("text", "address"),
    [("died\n\tip: 10.0.0.7\nmore", "10.0.0.7"), ("(pid=3, ip=127.0.0.2)", "127.0.0.2"), ("", "")],
)
def test_error_names_the_node_where_ray_does(text: str, address: str) -> None:
    from orchestrator.executors.ray_tune.nodes import address_in

    assert address_in(died(text)) == address
