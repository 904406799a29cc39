"""Faults in the middle of a real sweep through `dipgo-sweep run`, on a bundled model."""

from __future__ import annotations

import json

import pytest
import safetensors.torch

from orchestrator.store import open_store
from orchestrator.task.steps import CHECKPOINT, CURVE
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


def checkpointed(sweep: RealSweep) -> tuple[str, list[float]] | None:
    """Return the key of a search that has a checkpoint, and when it had made each of its steps."""
    for path in (sweep.storage / "progress").glob("*/checkpoint.safetensors"):
        key = path.parent.name
        data = open_store(str(sweep.storage)).get_progress(key, CHECKPOINT)
        if data is not None:
            rows = json.loads(safetensors.torch.load(data)[CURVE].numpy().tobytes())
            return key, [row["seconds"] for row in rows]
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
    key, made = wait_for("a search has a checkpoint", lambda: checkpointed(real), 180, child.told)
    lost = searching_node(cluster, real, key)
    cluster.kill(lost)
    cluster.add_node()
    finished(real, undisturbed)
    record, whole = (records_in(sweep.storage)[key] for sweep in (real, undisturbed))
    curve = record["outputs"]["curve"]
    assert curve["search_step"] == whole["outputs"]["curve"]["search_step"]
    assert curve["seconds"][: len(made)] == made  # what the lost node had done was not done again
    assert record["outputs"]["forwards"] == whole["outputs"]["forwards"]
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
