"""Which lanes open, wait and go home, on clusters that are made up."""

from __future__ import annotations

from typing import Any

from orchestrator.executors.placement import NODE, SHARE, bundle_of
from orchestrator.executors.roster import EXTRA_LANES, IDLE_S, VAIN_S, Roster, Worker
from orchestrator.records import Pool, Task

SMALL, LARGE = Pool(cpus=1), Pool(cpus=2, gpus=1)
ALONE = Pool(cpus=1, gpus=1, exclusive=True)


def node(name: str, cpus: float = 4, gpus: float = 1) -> Any:
    resources = {"CPU": cpus, "GPU": gpus, NODE: 1.0}
    return {"NodeID": name, "NodeManagerAddress": name, "Alive": True, "Resources": resources}


NODES = [node("a"), node("b")]


def roster(starts: int = 100) -> Roster:
    return Roster(lambda pool: bundle_of(pool, NODES, {}, by_node=True), starts=starts)


def lane(where: Roster, pool: Pool, state: Any, on: str = "a", now: float = 0.0) -> str:
    name = where.open(pool, now)
    worker = where.workers[name]
    worker.node = "" if state == "starting" else on
    worker.turn(state, now)
    return name


def test_lanes_open_one_a_ready_task_while_there_is_room() -> None:
    assert roster().missing({SMALL: 3}, NODES) == [SMALL] * 3
    assert roster().missing({SMALL: 50}, NODES) == [SMALL] * 8  # 4 CPUs a node
    assert roster().missing({LARGE: 5, SMALL: 1}, NODES) == [LARGE] * 2 + [SMALL]


def test_full_pool_asks_for_a_few_more_so_that_an_autoscaler_sees_them() -> None:
    full = roster()
    for _ in range(2):
        lane(full, LARGE, "working")
    assert full.missing({LARGE: 3}, NODES) == [LARGE] * 3
    assert len(full.missing({LARGE: 100}, NODES)) == EXTRA_LANES


def test_lanes_start_few_at_a_time() -> None:
    few = roster(starts=1)
    assert few.missing({SMALL: 8}, NODES) == [SMALL] * 2  # one a node
    lane(few, SMALL, "starting")
    assert few.missing({SMALL: 8}, NODES) == [SMALL]


def test_lanes_start_as_many_as_a_node_has_cpus() -> None:
    small, half = node("head", cpus=2), Pool(cpus=0.25)
    assert len(roster().missing({half: 99}, [small, node("large", cpus=16)])) == 18


def test_lanes_that_wait_or_start_are_counted_before_new_ones_open() -> None:
    some = roster()
    lane(some, SMALL, "waiting")
    lane(some, SMALL, "starting")
    assert some.missing({SMALL: 2}, NODES) == []
    assert some.missing({SMALL: 3}, NODES) == [SMALL]


def test_barred_lane_keeps_the_place_of_its_node() -> None:
    barred = roster()
    for _ in range(4):
        lane(barred, SMALL, "barred", on="b")
    assert barred.missing({SMALL: 50}, NODES) == [SMALL] * 4
    assert barred.waiting() == []


def test_idle_lane_stays_while_others_have_room() -> None:
    idle = roster()
    lane(idle, SMALL, "waiting")
    assert idle.retiring({LARGE: 1}, NODES, now=1.0) == []
    assert idle.retiring({}, NODES, now=1.0) == []


def test_idle_lane_goes_home_for_another_pool_without_room() -> None:
    idle = roster()
    taken = [lane(idle, LARGE, "waiting", on) for on in "ab"]
    half = Pool(cpus=1, gpus=0.5)
    assert idle.retiring({half: 1}, NODES, now=1.0) == taken[:1]
    assert idle.retiring({half: 1, LARGE: 1}, NODES, now=1.0) == []  # its own pool has work


def test_idle_lanes_all_leave_for_one_that_must_be_alone() -> None:
    idle = roster()
    waiting = [lane(idle, SMALL, "waiting", on) for on in "aabb"]
    lane(idle, SMALL, "working", "b")
    assert idle.retiring({ALONE: 1}, NODES, now=1.0) == waiting


def test_idle_lane_goes_home_after_a_while() -> None:
    idle = roster()
    name = lane(idle, SMALL, "waiting", now=0.0)
    assert idle.retiring({}, NODES, now=IDLE_S - 1) == []
    assert idle.retiring({}, NODES, now=IDLE_S + 1) == [name]
    assert idle.retiring({SMALL: 1}, NODES, now=IDLE_S + 1) == []


def test_lane_that_nobody_waits_for_any_more_is_taken_back() -> None:
    late = roster()
    name = lane(late, LARGE, "starting")
    assert late.in_vain({LARGE: 1}, NODES, VAIN_S + 1) == []
    assert late.in_vain({}, NODES, VAIN_S - 1) == []
    assert late.in_vain({}, NODES, VAIN_S + 1) == [name]


def test_lane_whose_node_left_is_taken_back_if_another_would_fit() -> None:
    nodes = [node("a", cpus=4), node("b", cpus=16)]
    whole = Roster(lambda pool: bundle_of(pool, nodes, {}, by_node=False))
    name = whole.open(ALONE, 0.0)
    assert whole.workers[name].bundle["CPU"] == 16
    assert whole.in_vain({ALONE: 1}, nodes, 1.0) == []
    del nodes[1]
    assert whole.in_vain({ALONE: 1}, nodes, 1.0) == [name]


def test_worker_tells_the_scheduler_its_pool_and_pipelines() -> None:
    worker = Worker(SMALL, 0.0, held=("b", "a"))
    worker.turn("working", 3.0, Task(kind="search", inputs={}))
    assert (worker.lane.pool, worker.lane.held) == (SMALL, ("b", "a"))
    assert (worker.since, worker.task) == (3.0, Task(kind="search", inputs={}))


def test_bundle_of_a_lane_names_its_accelerator() -> None:
    pool = Pool(cpus=1, gpus=0.25, accelerator="A100")
    expected = {"CPU": 1, "GPU": 0.25, "accelerator_type:A100": SHARE, NODE: SHARE}
    assert bundle_of(pool, NODES, {}, by_node=True) == expected
