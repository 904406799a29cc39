"""Faults in the middle of a real sweep through `dipgo-sweep run`, on a bundled model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.checker import check_artifacts, check_equal, check_mlflow, records_in
from tests.cluster.drivers import RealSweep, moment
from tests.cluster.harness import Cluster, Node
from tests.cluster.processes import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(420)]

RUN_S = 300.0


def tracked_keys(sweep: RealSweep) -> set[str]:
    """Return the keys that MLflow must have a run of: points, and searches."""
    points = {point["key"] for point in sweep.json("pareto")["points"]}
    records = records_in(sweep.storage).values()
    return points | {record["key"] for record in records if record["kind"] == "search"}


def finished(sweep: RealSweep, undisturbed: RealSweep) -> None:
    """Let the last run end well, and compare store, acknowledgements, MLflow, and figures."""
    child = sweep.runs[-1]
    assert child.wait(RUN_S) == 0, child.told()
    sweep.checked()
    check_artifacts(sweep.storage)
    check_equal(sweep.storage, undisturbed.storage)
    check_mlflow(sweep.database, tracked_keys(sweep))


def checkpointed(sweep: RealSweep) -> dict[str, Any] | None:
    """Return the last step of the search that has a checkpoint, and its key."""
    for path in (sweep.storage / "progress").glob("*/checkpoint.safetensors"):
        return {"key": path.parent.name, "written": path.stat().st_mtime}
    return None


def searching_node(cluster: Cluster, sweep: RealSweep, key: str) -> Node:
    """Return the node whose worker holds the claim of a task."""
    claims = sorted((sweep.storage / "claims" / key).glob("*.json"))
    pid = json.loads(claims[-1].read_text(encoding="utf-8"))["pid"]
    return next(n for n in cluster.workers if pid in {each.pid for each in n.workers()})


def test_search_goes_on_from_its_checkpoint_on_another_node(
    cluster: Cluster, real: RealSweep, undisturbed: RealSweep
) -> None:
    """Each node has a home, and so Tune folders, of its own; the state is in our store."""
    cluster.with_nodes(2)
    child = real.run()
    found = wait_for("a search has a checkpoint", lambda: checkpointed(real), 180, child.told)
    key = found["key"]
    lost = searching_node(cluster, real, key)
    cluster.kill(lost)
    cluster.add_node()
    finished(real, undisturbed)
    curve = records_in(real.storage)[key]["outputs"]["curve"]["search_step"]
    assert curve == sorted(set(curve))
    record, whole = (records_in(sweep.storage)[key] for sweep in (real, undisturbed))
    assert record["outputs"]["forwards"] == whole["outputs"]["forwards"]
    searched_in_all, last_attempt = record["outputs"]["seconds"], record["timings"]["seconds"]
    assert last_attempt < searched_in_all  # what the lost node had done was not done again
    homes = {node.folder for node in (lost, *cluster.workers)}
    assert len(homes) == 3


def test_killed_driver_recomputes_nothing_and_leaves_no_open_run(
    cluster: Cluster, real: RealSweep, undisturbed: RealSweep
) -> None:
    cluster.with_nodes(2)
    child = real.run()
    real.wait_for_acks(moment("real driver"), child)
    child.kill()
    before = {p.name: p.stat().st_mtime_ns for p in (real.storage / "records").glob("*")}
    real.run()
    finished(real, undisturbed)
    after = {p.name: p.stat().st_mtime_ns for p in (real.storage / "records").glob("*")}
    assert {name: after[name] for name in before} == before


def test_lost_head_ends_the_command_and_a_new_cluster_finishes(
    own_cluster: Cluster, cluster: Cluster, real: RealSweep, undisturbed: RealSweep
) -> None:
    own_cluster.start_head()
    own_cluster.add_node()
    real.cluster = own_cluster
    child = real.run()
    real.wait_for_acks(moment("real head", 1, 3), child)
    own_cluster.kill(own_cluster.head)
    code = child.wait(120)
    assert code not in (0, None) and "run" in child.stderr(), child.told()
    own_cluster.stop()
    real.cluster = cluster
    cluster.with_nodes(2)
    real.run()
    finished(real, undisturbed)
