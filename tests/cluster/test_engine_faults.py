"""Faults in the middle of a sweep of made-up tasks: every task is finished exactly once."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.cluster.checker import check_equal, records_in
from tests.cluster.drivers import TASKS, EngineSweep, moment
from tests.cluster.harness import Cluster, Node
from tests.cluster.processes import Process, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

RUN_S = 150.0


@pytest.fixture(scope="module")
def expected(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage of an undisturbed run."""
    sweep = EngineSweep(cluster, tmp_path_factory.mktemp("expected"))
    cluster.with_nodes(3)
    child = sweep.run()
    assert child.wait(RUN_S) == 0, child.told()
    sweep.checked()
    assert len(sweep.acks()) == TASKS
    return sweep.storage


def finished(sweep: EngineSweep, expected: Path) -> None:
    """Let the last run of a sweep end well, and compare everything that is left."""
    child = sweep.runs[-1]
    assert child.wait(RUN_S) == 0, child.told()
    sweep.checked()
    assert len(sweep.acks()) == TASKS, child.told()
    check_equal(sweep.storage, expected, tolerance=0.0)


def lost_as(sweep: EngineSweep) -> set[str]:
    """Return what the driver took earlier attempts of finished tasks to have failed of."""
    records = records_in(sweep.storage).values()
    return {attempt["failure"] for record in records for attempt in record["attempts"]}


def tried_again(sweep: EngineSweep) -> set[str]:
    """Return the finished tasks that had an attempt before."""
    records = records_in(sweep.storage)
    return {key for key, record in records.items() if record["attempts"]}


def busy_nodes(cluster: Cluster, sweep: EngineSweep) -> list[Node]:
    """Return the nodes that tasks are running on now."""
    addresses = {line["node"] for line in sweep.running()}
    return [node for node in cluster.workers if node.address in addresses]


@pytest.mark.parametrize("lost", [1, 2], ids=["a_node", "two_nodes_at_once"])
def test_losing_nodes_loses_no_task(
    lost: int, cluster: Cluster, engine: EngineSweep, expected: Path
) -> None:
    cluster.with_nodes(3)
    child = engine.run()
    engine.wait_for_acks(moment(f"{lost} nodes"), child)
    nodes = wait_for("nodes are busy", lambda: busy_nodes(cluster, engine)[:lost], 60, child.told)
    cluster.kill(*nodes)
    gone = {node.address for node in nodes}
    interrupted = {line["key"] for line in engine.running() if line["node"] in gone}
    finished(engine, expected)
    assert interrupted <= tried_again(engine)
    assert lost_as(engine) <= {"node_lost"}


def test_losing_a_task_process_loses_no_task(
    cluster: Cluster, engine: EngineSweep, expected: Path
) -> None:
    cluster.with_nodes(3)
    child = engine.run()
    engine.wait_for_acks(moment("process"), child)
    running = wait_for("a task runs", engine.running, 60, child.told)
    process = Process.of(running[0]["pid"])
    assert process is not None
    process.send(signal.SIGKILL)
    interrupted = {line["key"] for line in engine.running() if line["pid"] == process.pid}
    finished(engine, expected)
    assert interrupted <= tried_again(engine)
    assert lost_as(engine) <= {"worker_lost"}


def test_killed_driver_is_gone_on_with(
    cluster: Cluster, engine: EngineSweep, expected: Path
) -> None:
    cluster.with_nodes(3)
    child = engine.run()
    engine.wait_for_acks(moment("driver"), child)
    child.kill()
    finished_before, begun = {*records_in(engine.storage)}, len(engine.work("began"))
    again = engine.run()
    assert again.wait(RUN_S) == 0, again.told()
    engine.checked()
    recomputed = {line["key"] for line in engine.work("began")[begun:]} & finished_before
    assert not recomputed
    check_equal(engine.storage, expected, tolerance=0.0)


def test_two_drivers_at_the_same_instant_one_works(
    cluster: Cluster, engine: EngineSweep, expected: Path
) -> None:
    cluster.with_nodes(2)
    both = [engine.run(), engine.run()]
    wait_for("one is refused", lambda: any(each.code for each in both), RUN_S, both[0].told)
    refused, working = sorted(both, key=lambda child: child.code is None)
    assert "being run by" in refused.stderr() and "Traceback" not in refused.stderr()
    assert working.wait(RUN_S) == 0, working.told()
    engine.checked()
    check_equal(engine.storage, expected, tolerance=0.0)


def test_node_that_joins_late_gets_work(
    cluster: Cluster, engine: EngineSweep, expected: Path
) -> None:
    cluster.with_nodes(1)
    engine.seconds = 5.0  # it must have time to join
    child = engine.run()
    engine.wait_for_acks(1, child)
    late = cluster.add_node()
    wait_for(
        "the late node works",
        lambda: any(line["node"] == late.address for line in engine.work("began")),
        100,
        child.told,
    )
    finished(engine, expected)


def test_lost_head_ends_the_driver_and_a_new_cluster_finishes(
    own_cluster: Cluster, cluster: Cluster, engine: EngineSweep, expected: Path
) -> None:
    own_cluster.start_head()
    own_cluster.add_node()
    cluster.with_nodes(2)
    engine.cluster = own_cluster
    child = engine.run()
    engine.wait_for_acks(moment("head"), child)
    own_cluster.kill(own_cluster.head)
    assert child.wait(120) != 0, child.told()
    finished_before, begun = {*records_in(engine.storage)}, len(engine.work("began"))
    engine.cluster = cluster
    engine.run()
    assert engine.runs[-1].wait(RUN_S) == 0, engine.runs[-1].told()
    engine.checked()
    recomputed = {line["key"] for line in engine.work("began")[begun:]} & finished_before
    assert not recomputed
    check_equal(engine.storage, expected, tolerance=0.0)
