"""Where tasks are put, on clusters that are made up."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dipgo_core.errors import TaskError
from orchestrator.executors.placement import (
    NODE,
    SHARE,
    bundle_of,
    declares_nodes,
    latency_nodes,
    most_common,
    narrowed,
    slots,
)
from orchestrator.records import Pool
from orchestrator.sweep_settings import TaskResources

GPU = TaskResources(cpus=2, gpus=1)


def node(name: str, accelerator: str = "", *, alive: bool = True, **resources: float) -> Any:
    typed = {f"accelerator_type:{accelerator}": 1.0} if accelerator else {}
    return {
        "NodeID": name,
        "NodeManagerAddress": f"10.0.0.{name}",
        "Alive": alive,
        "Resources": {"CPU": 8.0, NODE: 1.0, **typed, **resources},
    }


HEAD = node("1", CPU=0.0)
A100 = [node(name, "A100", GPU=4.0) for name in "234"]
T4 = [node(name, "T4", GPU=1.0) for name in "56"]
CLUSTER = [HEAD, *T4, *A100]


def names(nodes: Any) -> list[str]:
    return [each["NodeID"] for each in nodes]


def test_latency_nodes_have_the_most_common_type_that_fits() -> None:
    assert names(latency_nodes(CLUSTER, GPU)) == ["2", "3", "4"]
    assert names(latency_nodes([*T4, *A100[:2]], GPU)) == ["2", "3"]  # two each: by name
    assert names(latency_nodes(CLUSTER, TaskResources(gpus=2))) == ["2", "3", "4"]


def test_latency_nodes_have_the_type_asked_for() -> None:
    wanted = TaskResources(gpus=1, accelerator="T4")
    assert names(latency_nodes(CLUSTER, wanted)) == ["5", "6"]


def test_latency_nodes_without_gpu_are_all_that_have_the_processors() -> None:
    dead = node("9", alive=False)
    assert names(latency_nodes([*CLUSTER, dead], TaskResources(cpus=4))) == list("56234")


def test_latency_nodes_that_do_not_exist_are_refused_with_what_there_is() -> None:
    with pytest.raises(TaskError, match=r"1 CPUs and 1 GPUs of H100 .* are A100, T4"):
        latency_nodes(CLUSTER, TaskResources(gpus=1, accelerator="H100"))
    with pytest.raises(TaskError, match="9 CPUs for"):
        latency_nodes(CLUSTER, TaskResources(cpus=9))


def test_most_common_takes_the_first_by_alphabet_of_several() -> None:
    assert most_common(["b", "a", "b", "a", "c"]) == "a"


def test_narrowed_asks_for_the_type_of_gpu() -> None:
    devices = dict.fromkeys("234", "NVIDIA A100")
    assert narrowed(A100, devices, "NVIDIA A100") == {"accelerator_type:A100": SHARE}


def test_narrowed_asks_for_nothing_where_all_nodes_are_alike() -> None:
    plain = [node("1"), node("2")]
    assert narrowed(plain, {"1": "a CPU", "2": "a CPU"}, "a CPU") == {}


def test_narrowed_stays_on_one_node_where_processors_differ() -> None:
    plain = [node("1"), node("2"), node("3")]
    devices = {"1": "old", "2": "new", "3": "new"}
    assert narrowed(plain, devices, "new") == {"node:10.0.0.2": SHARE}


def test_bundle_of_a_latency_task_is_a_whole_node() -> None:
    alone = Pool(cpus=2, gpus=1, exclusive=True)
    extra = {"accelerator_type:A100": SHARE}
    bundle = bundle_of(alone, CLUSTER, extra, by_node=True)
    assert bundle == {"CPU": 2, "GPU": 1, NODE: 1, "accelerator_type:A100": SHARE}


def test_bundle_of_any_other_task_is_a_share_of_a_node() -> None:
    bundle = bundle_of(Pool(), CLUSTER, {"x": 1}, by_node=True)
    assert bundle == {"CPU": 1, NODE: SHARE}


def test_bundle_without_node_resource_takes_all_cpus_of_a_node_that_fits() -> None:
    alone = Pool(gpus=1, exclusive=True)
    cluster = [node("1", CPU=64.0), node("2", "A100", GPU=1.0), node("3", "T4", GPU=1.0, CPU=16.0)]
    assert bundle_of(alone, cluster, {}, by_node=False) == {"CPU": 16, "GPU": 1}
    extra = {"accelerator_type:A100": SHARE}
    assert bundle_of(alone, cluster, extra, by_node=False)["CPU"] == 8


def test_bundle_without_node_resource_takes_all_cpus_for_a_latency_on_a_processor() -> None:
    bundle = bundle_of(Pool(exclusive=True), [node("1", CPU=64.0), *T4], {}, by_node=False)
    assert bundle == {"CPU": 64}


def test_slots_are_counted_node_by_node_without_what_is_taken() -> None:
    assert slots({"CPU": 3.0}, CLUSTER) == 10  # two on each node with 8 CPUs
    assert slots({"CPU": 1.0, "GPU": 0.5}, CLUSTER) == 2 * 2 + 3 * 8
    assert slots({"GPU": 1.0}, CLUSTER, {"2": {"GPU": 3.0}, "5": {"GPU": 1.0}}) == 1 + 1 + 4 + 4
    assert slots({"TPU": 1.0}, CLUSTER) == 0


def test_cluster_without_node_resource_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    assert declares_nodes(CLUSTER)
    assert declares_nodes([{**HEAD, "Resources": {}}, *T4])  # nothing runs on that head
    assert not caplog.records
    lacking = node("7")
    del lacking["Resources"][NODE]
    with caplog.at_level(logging.WARNING):
        assert not declares_nodes([*CLUSTER, lacking])
    assert "10.0.0.7" in caplog.text
