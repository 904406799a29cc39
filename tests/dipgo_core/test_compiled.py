"""Compiled SubNets: equal to eager ones, no recompilation by rows, no graph breaks, no CUDA graphs.

In every test a recompilation where none is due, and any hit of its limit, is an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import DDIM, tiny_dit, tiny_model, tiny_sd
from torch import Tensor
from torch._dynamo.utils import counters

from dipgo_core.binding import subnet_of
from dipgo_core.config import ModelSettings
from dipgo_core.errors import SubNetError
from dipgo_core.evaluation.execution import compile_mode
from dipgo_core.gates import GateTable
from dipgo_core.hooks import is_hooked
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, loaded_model
from dipgo_core.runtime import SubNetHandle, apply_subnet
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.subnet import SubNet
from dipgo_core.zoo import shrunk

LONG = replace(DDIM, steps=40)
dynamo: Any = torch._dynamo


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    dynamo.reset()
    counters.clear()
    with dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    dynamo.reset()


@pytest.fixture(params=["sd", "dit"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return small_sd() if request.param == "sd" else small_dit()


@pytest.fixture
def sd() -> LoadedModel:
    return small_sd()


@pytest.fixture
def dit() -> LoadedModel:
    return small_dit()


def small_sd() -> LoadedModel:
    """Five blocks: compilers take their time."""
    loaded = tiny_model(
        tiny_sd(
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
    )
    set_sampler(loaded, LONG)
    return loaded


def small_dit() -> LoadedModel:
    loaded = tiny_model(tiny_dit())
    set_sampler(loaded, LONG)
    return loaded


def random_subnet(model: LoadedModel, granularity: str = "block") -> SubNet:
    """40 calls, more different rows than the limit of recompilations."""
    graph, rng = block_graph(model, granularity), np.random.default_rng(0)
    keep = rng.random((LONG.steps, graph.num_blocks)) < rng.random((LONG.steps, 1))
    keep[:, 0] |= rng.random(LONG.steps) < 0.9
    if model.family.name == "sd":
        keep[:, -1] |= keep[:, 0]  # without a U-Net's last block a call is skipped
    keep[0] = True
    closed = graph.close(GateTable(keep))
    assert len(set(closed.to_strings())) > dynamo.config.recompile_limit
    return subnet_of(model, graph, LONG, closed)


def images(model: LoadedModel, batch: int = 2, **kwargs: Any) -> Tensor:
    arguments = {
        "num_inference_steps": LONG.steps,
        "guidance_scale": 4.0,
        "generator": torch.Generator().manual_seed(1),
        "output_type": "pt",
        **kwargs,
    }
    prompts = [1] * batch if model.family.name == "dit" else ["the moon"] * batch
    return torch.as_tensor(model.pipe(prompts, **arguments).images)


def compiled(model: LoadedModel, subnet: SubNet, backend: str = "eager") -> SubNetHandle:
    return apply_subnet(model.pipe, subnet).compile(backend=backend, fullgraph=True)


@pytest.mark.parametrize(("granularity", "backend"), [("block", "aot_eager"), ("layer", "eager")])
def test_compiled_runs_equal_eager_ones(model: LoadedModel, granularity: str, backend: str) -> None:
    subnet = random_subnet(model, granularity)
    with apply_subnet(model.pipe, subnet):
        expected = images(model)
    with compiled(model, subnet, backend), dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(images(model), expected)
        torch.testing.assert_close(images(model), expected)
    assert counters["graph_break"] == {}


def test_compiled_runs_extrapolate_as_eager_ones_do(model: LoadedModel) -> None:
    repeated = random_subnet(model)
    gates = GateTable(repeated.gates.keep, 0.5)
    subnet = subnet_of(model, block_graph(model), LONG, gates)
    with apply_subnet(model.pipe, subnet):
        expected = images(model)
    with compiled(model, subnet, "aot_eager"):
        torch.testing.assert_close(images(model), expected)
    with apply_subnet(model.pipe, repeated):
        assert not torch.allclose(images(model), expected, atol=1e-4)


def test_blocks_of_one_kind_are_compiled_once(model: LoadedModel) -> None:
    """Oracle: four equal DiT blocks; five U-Net blocks of different kinds."""
    with compiled(model, random_subnet(model)):
        images(model)
    kinds = {"dit": 1, "sd": 5}[model.family.name]
    assert counters["stats"]["unique_graphs"] == kinds


def test_what_was_compiled_serves_the_next_subnet(dit: LoadedModel) -> None:
    subnet = random_subnet(dit)
    sparse = GateTable(
        np.roll(subnet.gates.keep, 1, axis=0) | (np.arange(LONG.steps) == 0)[:, None]
    )
    with compiled(dit, subnet):
        images(dit)
    with compiled(dit, replace(subnet, gates=sparse)), dynamo.config.patch(error_on_recompile=True):
        images(dit)
    assert counters["stats"]["unique_graphs"] == 1


def test_calls_that_compute_all_run_as_one_compiled_whole(model: LoadedModel) -> None:
    """Oracle: eager runs; one graph, whoever of two SubNets was there first."""
    graph = block_graph(model)
    every = GateTable.all_keep(LONG.steps, graph.num_blocks)
    third = GateTable.from_calls(range(0, LONG.steps, 3), LONG.steps, graph.num_blocks)
    for gates in (every, third):
        subnet = subnet_of(model, graph, LONG, gates)
        with apply_subnet(model.pipe, subnet):
            expected = images(model)
        with compiled(model, subnet), dynamo.config.patch(error_on_recompile=True):
            torch.testing.assert_close(images(model), expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert counters["graph_break"] == {}


@pytest.mark.slow
def test_another_batch_and_resolution_compile_again_but_not_for_ever(sd: LoadedModel) -> None:
    """Oracle: eager runs; sizes become dynamic, so the last ones compile nothing new."""
    subnet = random_subnet(sd)
    sizes = [(1, 16), (2, 16), (2, 32), (3, 48)]
    with apply_subnet(sd.pipe, subnet):
        expected = [images(sd, batch, height=side, width=side) for batch, side in sizes]
    graphs = []
    with compiled(sd, subnet):
        for (batch, side), image in zip(sizes, expected, strict=True):
            torch.testing.assert_close(images(sd, batch, height=side, width=side), image)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] < graphs[2] == graphs[3]


def test_removing_leaves_nothing_compiled(dit: LoadedModel) -> None:
    plain, subnet = images(dit), random_subnet(dit)
    handle = compiled(dit, subnet)
    images(dit)
    assert compile_mode(dit.denoiser) == "torch.compile"
    handle.remove()
    frames = counters["stats"]["calls_captured"]
    assert torch.equal(images(dit), plain)
    assert counters["stats"]["calls_captured"] == frames
    assert compile_mode(dit.denoiser) == "none"


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_are_refused_and_nothing_stays_applied(dit: LoadedModel, mode: str) -> None:
    subnet = random_subnet(dit)
    with pytest.raises(SubNetError, match=f"mode='{mode}' records CUDA graphs.*This works"):
        apply_subnet(dit.pipe, subnet).compile(mode=mode)
    assert not is_hooked(dit.denoiser)
    apply_subnet(dit.pipe, subnet).remove()


def test_cuda_graphs_that_settings_of_pytorch_ask_for_are_refused(dit: LoadedModel) -> None:
    subnet, settings = random_subnet(dit), import_module("torch._inductor.config")
    with settings.patch("triton.cudagraphs", True):
        with pytest.raises(SubNetError, match=r"triton\.cudagraphs = True records .* works"):
            apply_subnet(dit.pipe, subnet).compile()
        with apply_subnet(dit.pipe, subnet) as handle:
            handle.compile(options={"triton.cudagraphs": False})
            handle.compile(backend="eager")


def test_lora_loaded_after_compiled_runs_is_of_kinds_of_its_own() -> None:
    """Oracle: eager runs. Ten ranks would be ten variants of one code object, which has eight."""
    model = tiny_model(tiny_dit(num_layers=10))
    set_sampler(model, LONG)
    subnet = random_subnet(model)
    ranks = {f"transformer_blocks.{n}.attn1.to_q": n + 1 for n in range(10)}
    config = LoraConfig(
        r=1, target_modules=["to_q"], init_lora_weights="gaussian", rank_pattern=ranks
    )
    with compiled(model, subnet):
        before = images(model)
        inject_adapter_in_model(config, model.denoiser)
        for name, parameter in model.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        found = images(model)
        with dynamo.config.patch(error_on_recompile=True):
            images(model)
    with apply_subnet(model.pipe, subnet):
        torch.testing.assert_close(found, images(model))
    assert not torch.equal(found, before)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd35", "flux-short"])
def test_transformers_of_two_kinds_of_blocks(name: str) -> None:
    """Oracle: eager runs; later blocks compile nothing that earlier ones of their kind did."""
    settings = ModelSettings(id=name, resolution=64)
    model = loaded_model(shrunk.build(name), settings, weights_sha256="0" * 64)
    sampler = replace(model.family.sampler, steps=12, guidance_scale=3.0)
    graph = block_graph(model)
    rng = np.random.default_rng(0)
    keep = rng.random((sampler.steps, graph.num_blocks)) < 0.7
    keep[:, 0] = keep[0] = True
    set_sampler(model, sampler)
    subnet = subnet_of(model, graph, sampler, GateTable(keep))

    def latents() -> Tensor:
        arguments = call_arguments(model, [Item("the moon")], [1], sampler)
        return torch.as_tensor(model.pipe(**{**arguments, "output_type": "latent"}).images)

    with apply_subnet(model.pipe, subnet):
        expected = latents()
    with compiled(model, subnet, "aot_eager"), dynamo.config.patch(error_on_recompile=True):
        torch.testing.assert_close(latents(), expected, atol=1e-4, rtol=1e-4)
    assert 1 < counters["stats"]["unique_graphs"] < graph.num_blocks
    assert counters["graph_break"] == {}


def test_a_denoiser_compiled_before_is_refused_with_the_line_that_works(dit: LoadedModel) -> None:
    subnet = random_subnet(dit)
    dit.denoiser.compile(backend="eager")
    with pytest.raises(
        SubNetError, match=r"This works: pipe\.transformer\._compiled_call_impl = None;"
    ):
        apply_subnet(dit.pipe, subnet)
    dit.pipe.transformer._compiled_call_impl = None
    with compiled(dit, subnet):
        images(dit)


def test_an_optimized_module_is_refused_with_the_line_that_works(dit: LoadedModel) -> None:
    subnet = random_subnet(dit)
    dit.pipe.transformer = torch.compile(dit.pipe.transformer, backend="eager")
    with pytest.raises(
        SubNetError, match=r"This works: pipe\.transformer = pipe\.transformer\._orig_mod;"
    ):
        apply_subnet(dit.pipe, subnet)
    dit.pipe.transformer = dit.pipe.transformer._orig_mod
    with compiled(dit, subnet):
        images(dit)


def test_compiling_the_denoiser_afterwards_is_refused(sd: LoadedModel) -> None:
    with apply_subnet(sd.pipe, random_subnet(sd)):
        sd.pipe.unet.mid_block.compile(backend="eager")
        with pytest.raises(SubNetError, match=r"pipe\.unet\.mid_block is compiled as a whole"):
            images(sd)


def test_parts_of_blocks_may_be_compiled(sd: LoadedModel) -> None:
    """As `compile_repeated_blocks` does with a U-Net: its blocks hold transformer blocks."""
    subnet = random_subnet(sd)
    with apply_subnet(sd.pipe, subnet):
        expected = images(sd)
        sd.pipe.unet.compile_repeated_blocks(backend="eager")
        torch.testing.assert_close(images(sd), expected)
    assert counters["graph_break"] == {}


def test_another_precision_and_layout_before_or_after(dit: LoadedModel, sd: LoadedModel) -> None:
    """Oracle: eager runs of the same; the blocks are compiled anew and then no more."""
    for model, change in (
        (dit, lambda pipe: pipe.to(torch.float64)),
        (sd, lambda pipe: pipe.unet.to(memory_format=torch.channels_last)),
    ):
        with compiled(model, random_subnet(model)):
            images(model)
            change(model.pipe)
            again = images(model)
            with dynamo.config.patch(error_on_recompile=True):
                torch.testing.assert_close(images(model), again)
        with apply_subnet(model.pipe, random_subnet(model)):
            torch.testing.assert_close(images(model), again)


def test_two_subnets_on_one_denoiser_compile_their_own(dit: LoadedModel) -> None:
    """Oracle: each alone. Hooks of the other, at another granularity, are no part of the code."""
    other = type(dit.pipe)(**dit.pipe.components)
    other.set_progress_bar_config(disable=True)
    both = [random_subnet(dit), random_subnet(dit, "layer")]
    expected = []
    for subnet in both:
        with apply_subnet(dit.pipe, subnet):
            expected.append(images(dit))
    pair = [(dit.pipe, both[0]), (other, both[1])]
    handles = [apply_subnet(pipe, s).compile(backend="eager", fullgraph=True) for pipe, s in pair]
    with dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for (pipe, _subnet), image in zip(pair, expected, strict=True):
                torch.testing.assert_close(images(replace(dit, pipe=pipe)), image)
    for handle in handles:
        handle.remove()


@pytest.mark.slow
def test_inductor_equals_eager(sd: LoadedModel) -> None:
    subnet = random_subnet(sd)
    with apply_subnet(sd.pipe, subnet):
        expected = images(sd)
    with compiled(sd, subnet, "inductor"):
        torch.testing.assert_close(images(sd), expected, atol=1e-4, rtol=1e-4)
    assert counters["graph_break"] == {}
