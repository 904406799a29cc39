"""What a SubNet gains here: side by side, by its own sampler, on pipelines of random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import diffusers
import numpy as np
import pytest
import torch
from tiny import DDIM, tiny_dit, tiny_model, tiny_scheduler, tiny_sd

from dipgo_core.binding import subnet_of
from dipgo_core.config import Convention
from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.evaluation import bench as module
from dipgo_core.evaluation.bench import bench, macs_speedups
from dipgo_core.evaluation.side_by_side import Effort
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.runtime import apply_subnet
from dipgo_core.subnet import SubNet

QUICK = Effort(warmup=0, min_runs=2, min_seconds=0, tries=1)


@pytest.fixture
def model() -> LoadedModel:
    return tiny_model(tiny_sd())


def half(model: LoadedModel) -> SubNet:
    """Every second call keeps the last block alone, or nothing."""
    graph = block_graph(model)
    keep = np.ones((DDIM.steps, graph.num_blocks), dtype=bool)
    keep[1::2] = np.arange(graph.num_blocks) % (graph.num_blocks - 1) == 0
    return subnet_of(model, graph, DDIM, GateTable(keep))


def test_bench_reports_both_sides_with_loop_and_cache(model: LoadedModel) -> None:
    subnet = half(model)
    found = bench(model, subnet, effort=QUICK).to_json()
    assert found["loop_ms"]["value"] < found["latency_ms"]["value"]
    assert found["speedup"]["n"] == 2 and found["images_per_second"]["value"] > 0
    with apply_subnet(model.pipe, subnet) as handle:
        model.pipe("a cat", **subnet.call_kwargs())
    assert found["peak_cache_bytes"] == handle.peak_cache_bytes > 0


def test_macs_speedup_is_that_of_the_table(model: LoadedModel) -> None:
    subnet, graph = half(model), block_graph(model)
    for convention, speedup in macs_speedups(model, subnet).items():
        pruned = graph.pruned_ratio(subnet.gates, cast(Convention, convention))
        assert speedup == pytest.approx(1 / (1 - pruned))


def test_macs_speedup_is_counted_at_the_size_that_is_measured(model: LoadedModel) -> None:
    """Oracle: the MACs of a SubNet of the same rows, made at that size."""
    subnet = half(model)
    larger = replace(model, settings=replace(model.settings, resolution=48))
    there = half(larger).macs
    found = macs_speedups(larger, subnet)
    assert found["all"] == pytest.approx(there["dense"] / there["kept"])
    assert found["all"] != pytest.approx(macs_speedups(model, subnet)["all"])


def test_bench_installs_the_subnets_own_scheduler(model: LoadedModel) -> None:
    subnet = half(model)
    model.pipe.scheduler = diffusers.EulerDiscreteScheduler()
    bench(model, subnet, effort=QUICK)
    assert type(model.pipe.scheduler).__name__ == "DDIMScheduler"


def test_bench_leaves_the_pipeline_dense(model: LoadedModel) -> None:
    subnet = half(model)
    model.pipe.scheduler = tiny_scheduler()

    def image() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        made = model.pipe("a cat", generator=generator, output_type="pt", **subnet.call_kwargs())
        return made.images

    before = image()
    bench(model, subnet, effort=QUICK)
    assert torch.equal(image(), before)


def test_bench_of_another_model_is_refused_before_anything_runs(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "measure_side_by_side", None)
    with pytest.raises(SubNetMismatchError, match=r"made for UNet.*DiTTransformer2DModel|has none"):
        bench(tiny_model(tiny_dit()), half(model), effort=QUICK)


def test_bench_of_an_unknown_scheduler_is_refused(model: LoadedModel) -> None:
    subnet = half(model)
    other = replace(subnet, sampler={**subnet.sampler, "scheduler": "NoSuchScheduler"})
    with pytest.raises(SubNetError, match="'NoSuchScheduler'"):
        bench(model, other, effort=QUICK)


def test_fused_bench_says_so(model: LoadedModel) -> None:
    assert bench(model, half(model), effort=QUICK, fuse=True).to_json()["fused"] is True


def test_compiled_bench_compiles_both_sides_once(model: LoadedModel) -> None:
    """The backend runs a graph as it is and counts: no compiler is needed."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    found = bench(model, half(model), effort=QUICK, compile={"backend": backend}).record
    once = len(graphs)
    assert found["compile"] == "torch.compile, by block" and once > 0
    bench(model, half(model), effort=replace(QUICK, min_runs=4), compile={"backend": backend})
    assert len(graphs) == once
