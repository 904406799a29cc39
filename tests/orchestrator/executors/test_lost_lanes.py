"""Which class of failure a lost lane is, told from what Ray raises."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")

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

    failure = lost_lane(error(), node_alive=alive, host="10.0.0.7", seconds=3.0)
    assert (failure.kind, failure.host, failure.seconds) == (kind, "10.0.0.7", 3.0)
    assert "\n" not in failure.error
