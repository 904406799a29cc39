"""Two Ray nodes of this machine, as if of different accelerators: latencies go to one of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.executors.placement import NODE
from orchestrator.records import Record, Task
from orchestrator.store import open_store
from orchestrator.sweep_settings import TaskResources
from tests.orchestrator.executors.test_contract import ListSource

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def address() -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster_utils = pytest.importorskip("ray.cluster_utils")
        settings = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 128 * 2**20}
        cluster = cluster_utils.Cluster()
        for accelerator in ("T4", "A100"):
            named = {NODE: 1, f"accelerator_type:{accelerator}": 1}
            cluster.add_node(resources=named, include_dashboard=False, **settings)
        yield cluster.address
        cluster.shutdown()


def timed_task() -> Any:
    """A task function that says where and when it ran; a closure, so that workers get it."""

    def run_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        import ray

        began = time.time()
        time.sleep(0.3)
        resources = ray.get_runtime_context().get_assigned_resources()
        node = ray.get_runtime_context().get_node_id()
        record = Record(
            key=task.key,
            kind=task.kind,
            state="done",
            inputs=task.inputs,
            outputs={"node": node, "span": [began, time.time()], "resources": sorted(resources)},
        )
        store.put_record(record)
        return record

    return run_task


def test_latencies_run_on_one_accelerator_each_alone_on_its_node(
    address: str, tmp_path: Path
) -> None:
    from orchestrator.executors.ray_tune.run import RayTuneExecutor

    timed = [
        Task(kind="latency", inputs={"number": i}, gpus=1, exclusive=True, label=f"latency {i}")
        for i in range(3)
    ]
    others = [Task(kind="search", inputs={"number": i}, label=f"search {i}") for i in range(6)]
    source = ListSource([*others[:3], *timed, *others[3:]])
    # Ray's own test cluster listens on this machine's address
    with RayTuneExecutor(address, insecure=True) as executor:
        executor.latency_device(TaskResources(gpus=1))
        executor.run(source, timed_task(), open_store(tmp_path))
    ran = {key: record.outputs for key, record in source.records.items()}
    alone = [ran.pop(task.key) for task in timed]
    (node,) = {outputs["node"] for outputs in alone}
    assert len(ran) == 6
    beside = [each["span"] for each in (*ran.values(), *alone) if each["node"] == node]
    for outputs in alone:
        began, ended = outputs["span"]
        others_there = [span for span in beside if span != outputs["span"]]
        assert all(end <= began or ended <= start for start, end in others_there)
    assert "accelerator_type:A100" in str(alone[0]["resources"])
