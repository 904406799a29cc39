"""What the driver makes of what its lanes say, with a desk and lanes that are made up."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dipgo_core.errors import TaskError
from orchestrator.executors.placement import NODE, bundle_of
from orchestrator.executors.roster import Roster
from orchestrator.records import Pool
from orchestrator.store import open_store
from orchestrator.store.probe import write_probe
from tests.orchestrator.executors.test_contract import ListSource, task

pytestmark = pytest.mark.filterwarnings("ignore")

NODES = [
    {
        "NodeID": "n",
        "NodeManagerAddress": "10.0.0.7",
        "Alive": True,
        "Resources": {"CPU": 2.0, NODE: 1.0},
    }
]


class FakeDesk:
    """Remembers the orders that lanes were given."""

    def __init__(self) -> None:
        self.orders: dict[str, Any] = {}
        self.answer = SimpleNamespace(remote=self.orders.update)


class FakeLanes:
    """Remembers which lanes were opened."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def open(self, lane: str, bundle: Any) -> None:
        self.opened.append(lane)

    def take_back(self, lane: str) -> None:
        self.opened.remove(lane)


@pytest.fixture
def floor(tmp_path: Path) -> Any:
    pytest.importorskip("ray")
    from orchestrator.executors.ray_tune.run import Floor

    cluster = SimpleNamespace(nodes=lambda: NODES, is_alive=lambda node: True)
    roster = Roster(lambda pool: bundle_of(pool, NODES, {}, by_node=True))
    source = ListSource([task(1), task(2)])
    return Floor(source, open_store(tmp_path), FakeDesk(), FakeLanes(), cluster, roster)


def asking(lane: str, **about: Any) -> Any:
    from orchestrator.executors.ray_tune.desk import Asking

    return Asking(lane=lane, node="n", host="10.0.0.7", **about)


def ended(lane: str, error: BaseException | None) -> Any:
    from orchestrator.executors.ray_tune.lanes import Ended

    return Ended(lane, error)


def test_lane_that_sees_the_storage_is_given_a_task(floor: Any) -> None:
    floor.adapt()
    first, second = floor.lanes.opened
    floor._asked(asking(first, written=write_probe(floor.store)))
    floor._hand_out()
    assert floor.desk.orders[first].inputs["number"] == 1
    assert floor.source.hosts == {"10.0.0.7"}
    assert second not in floor.desk.orders


@pytest.mark.parametrize("about", [{"problem": "no such folder"}, {"written": "elsewhere"}])
def test_node_that_joins_without_the_storage_gets_no_work(
    floor: Any, about: Any, caplog: pytest.LogCaptureFixture
) -> None:
    floor.adapt()
    with caplog.at_level(logging.WARNING):
        for lane in floor.lanes.opened:
            floor._asked(asking(lane, **about))
    floor._hand_out()
    assert floor.desk.orders == {}
    assert caplog.text.count("node 10.0.0.7 gets no work") == 1


def test_task_of_a_lane_that_ended_is_a_failure(floor: Any) -> None:
    floor.adapt()
    lane = floor.lanes.opened[0]
    floor._asked(asking(lane, written=write_probe(floor.store)))
    floor._hand_out()
    floor._ended(ended(lane, RuntimeError("killed")))
    (failure,) = floor.source.failures.values()
    assert (failure.kind, failure.host) == ("worker_lost", "10.0.0.7")
    assert lane not in floor.roster.workers


def test_lane_that_went_home_as_told_is_no_failure(floor: Any) -> None:
    floor.adapt()
    floor._ended(ended(floor.lanes.opened[0], None))
    assert floor.source.failures == {}


def test_lane_that_was_given_up_goes_home_when_it_comes_back(floor: Any) -> None:
    floor._asked(asking("lane-99999"))
    assert floor.desk.orders == {"lane-99999": None}


def test_workers_that_never_start_end_the_run(floor: Any) -> None:
    for number in range(5):
        floor.roster.open(Pool(), 0.0)
        lane = list(floor.roster.workers)[-1]
        if number < 4:
            floor._ended(ended(lane, RuntimeError("no module named dipgo_core")))
    with pytest.raises(TaskError, match=r"5 workers in a row.*no module named dipgo_core"):
        floor._ended(ended(lane, RuntimeError("no module named dipgo_core")))


def test_lane_taken_back_as_it_asks_is_given_nothing(floor: Any) -> None:
    floor.adapt()
    first = floor.lanes.opened[0]
    floor.source.demand = dict
    floor.roster.workers[first].since -= 3600
    floor.adapt()
    assert first not in floor.lanes.opened
    floor._asked(asking(first, written=write_probe(floor.store)))
    floor._hand_out()
    assert floor.desk.orders == {first: None}
    assert not floor.source.running


def test_lane_that_is_stopped_at_work_loses_its_task(floor: Any) -> None:
    floor.adapt()
    lane = floor.lanes.opened[0]
    floor._asked(asking(lane, written=write_probe(floor.store)))
    floor._hand_out()
    floor._ended(ended(lane, None))
    (failure,) = floor.source.failures.values()
    assert failure.kind == "worker_lost"


def lost_as_they_start(floor: Any, count: int, error: BaseException) -> None:
    for _ in range(count):
        floor._ended(ended(floor.roster.open(Pool(), 0.0), error))


def test_workers_that_never_start_are_only_told_of_while_others_work(
    floor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    floor.adapt()
    floor._asked(asking(floor.lanes.opened[0], written=write_probe(floor.store)))
    floor._hand_out()
    with caplog.at_level(logging.WARNING):
        lost_as_they_start(floor, 7, RuntimeError("no module named dipgo_core (ip=10.0.0.7)"))
    assert caplog.text.count("5 workers in a row did not start, the last one on node 10.0.0.7") == 1


def test_workers_that_are_lost_with_their_node_as_they_start_do_not_count(floor: Any) -> None:
    errors = pytest.importorskip("ray").exceptions
    lost_as_they_start(floor, 9, errors.RayActorError(error_msg="died\n\tip: 10.9.9.9"))
    lost_as_they_start(floor, 9, errors.RayActorError(error_msg="died", preempted=True))
    assert floor.false_starts == 0


def test_node_that_joins_without_its_name_is_told_of_once(
    floor: Any, caplog: pytest.LogCaptureFixture
) -> None:
    late = {**NODES[0], "NodeID": "l", "NodeManagerAddress": "10.0.0.8", "Resources": {"CPU": 2.0}}
    floor.cluster.nodes = lambda: [*NODES, late]
    with caplog.at_level(logging.WARNING):
        floor.adapt()
        floor.adapt()
    assert caplog.text.count("node 10.0.0.8 gets no work") == 1


def test_tasks_that_fit_nowhere_are_set_aside(floor: Any) -> None:
    large = Pool(gpus=4)
    floor.source.demand = lambda: {large: 1, Pool(): 1}
    floor.adapt()
    assert floor.source.aside == {large}


def test_lane_without_work_goes_home_for_one_that_needs_its_place(floor: Any) -> None:
    floor.adapt()
    for lane in floor.lanes.opened:
        floor._asked(asking(lane, written=write_probe(floor.store)))
    floor.source.waiting = {}
    floor.source.demand = lambda: {Pool(exclusive=True): 1}
    floor.adapt()
    assert floor.desk.orders == dict.fromkeys(floor.lanes.opened[:2])
    assert len(floor.lanes.opened) == 3  # and one for the task that must be alone


def test_cluster_of_this_machine_has_room_for_its_largest_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    from orchestrator.executors.ray_tune import run

    monkeypatch.setattr(run.os, "cpu_count", lambda: 4)
    asked = [(1, 1.0), (1, 2.0), (3, 2.0), (1, 9.0), (None, 2.0)]
    assert [run._slots_for(*each) for each in asked] == [1, 2, 3, 4, None]
