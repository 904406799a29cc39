"""find_blocks: SD-1.5's published figures, hand-drawn graphs, and the traps of tracing."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_transformer, tiny_unet
from torch import Tensor, nn

from dipgo_core.blocks import GRANULARITIES, find_blocks, known_graph
from dipgo_core.config import Granularity
from dipgo_core.errors import TraceError
from dipgo_core.families import family_of_pipeline, find_known
from dipgo_core.gates import GateTable
from dipgo_core.graph import INPUT, BlockGraph, Reuse
from dipgo_core.meta import meta_copy
from dipgo_core.pipelines import graph_of
from dipgo_core.zoo.shrunk import build

RELEASED = Path(__file__).parents[3] / "shared" / "data" / "sd15-released-keep-0.8.json"


@pytest.fixture(scope="module")
def sd15() -> BlockGraph:
    known = find_known("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert known is not None
    return known_graph(known)


def test_sd15_has_nine_blocks_and_the_denoiser(sd15: BlockGraph) -> None:
    down, up = [f"down_blocks.{i}" for i in range(4)], [f"up_blocks.{i}" for i in range(4)]
    assert sd15.names == ("", *down, "mid_block", *up)
    assert sd15.blocks[0].reuse is Reuse.SKIP
    assert {block.reuse for block in sd15.blocks[1:]} == {Reuse.OUTPUT}


def test_sd15_edges_are_the_skip_connections(sd15: BlockGraph) -> None:
    """Oracle: three skips an up block, taken in reverse (U-Net of SD-1.5, drawn by hand)."""
    down0, down1, down2, down3, mid, up0, up1, up2, up3 = range(1, 10)
    assert sd15.producers == (
        (up3,),
        (INPUT,),
        (INPUT, down0),
        (INPUT, down1),
        (INPUT, down2),
        (INPUT, down3),
        (INPUT, down2, down3, mid),
        (INPUT, down1, down2, up0),
        (INPUT, down0, down1, up1),
        (INPUT, down0, up2),
    )


def test_sd15_savings_are_the_published_ones(sd15: BlockGraph) -> None:
    """Oracle: gamma of the method's description, conv + linear."""
    gamma = [0.097, 0.092, 0.093, 0.011, 0.018, 0.067, 0.382, 0.708, 1.0]
    assert sd15.savings("paper")[1:] == pytest.approx(gamma, abs=0.001)


def test_sd15_has_47_distinct_rows_after_closure(sd15: BlockGraph) -> None:
    rows = itertools.product((False, True), repeat=9)
    closed = {tuple(sd15.live(np.array([True, *row])).tolist()) for row in rows}
    assert len(closed) == 47


def test_sd15_skip_gate_is_implied_by_the_last_block(sd15: BlockGraph) -> None:
    assert sd15.searched == tuple(range(1, 10))


@pytest.mark.skipif(not RELEASED.exists(), reason="the released gates are not beside the checkout")
@pytest.mark.parametrize("convention", ["all", "paper"])
def test_released_gates_keep_a_fifth(sd15: BlockGraph, convention: Any) -> None:
    rows = json.loads(RELEASED.read_text("utf-8"))["keep"]
    gates = GateTable.from_strings([("1" if "1" in row else "0") + row for row in rows])
    assert 1 - sd15.pruned_ratio(gates, convention) == pytest.approx(0.2, abs=0.0005)


def test_dit_is_a_residual_chain_modulated_by_the_input() -> None:
    known = find_known("facebook/DiT-XL-2-256")
    assert known is not None
    graph = known_graph(known)
    chain = tuple((INPUT, n) for n in range(1, 28))
    assert graph.producers == ((INPUT, 28), (INPUT,), *chain)
    assert {block.reuse for block in graph.blocks[1:]} == {Reuse.RESIDUAL}
    assert {block.streams for block in graph.blocks[1:]} == {("hidden_states",)}
    assert graph.searched == tuple(range(29))


# granularity layer, streams -----------------------------------------------------------------------


def graph_at(model: str, granularity: Granularity) -> BlockGraph:
    known = find_known(model)
    assert known is not None
    return known_graph(known, granularity)


@pytest.fixture(scope="module")
def sd15_layers() -> BlockGraph:
    return graph_at("stable-diffusion-v1-5/stable-diffusion-v1-5", "layer")


def test_sd15_has_44_layers(sd15_layers: BlockGraph) -> None:
    """Oracle: SD-1.5, counted by hand: two ResNets a down block, three an up block, two in the
    middle; an attention stack after each but in the lowest blocks."""
    kinds = Counter(name.split(".")[-2] for name in sd15_layers.names[1:])
    resnets, stacks = 4 * 2 + 2 + 4 * 3, 3 * 2 + 1 + 3 * 3
    assert kinds == {
        "resnets": resnets, "attentions": stacks, "downsamplers": 3, "upsamplers": 3
    }  # fmt: skip
    assert {block.reuse for block in sd15_layers.blocks[1:]} == {Reuse.OUTPUT}


def test_sd15_layers_feed_each_other_as_drawn_by_hand(sd15_layers: BlockGraph) -> None:
    """Oracle: the first down block and the last up block of SD-1.5."""
    number = {name: n for n, name in enumerate(sd15_layers.names)}

    def producers(name: str) -> set[str | int]:
        return {
            p if p == INPUT else sd15_layers.names[p] for p in sd15_layers.producers[number[name]]
        }

    down, up = "down_blocks.0", "up_blocks.3"
    assert producers(f"{down}.resnets.0") == {INPUT}
    assert producers(f"{down}.attentions.0") == {INPUT, f"{down}.resnets.0"}
    assert producers(f"{down}.downsamplers.0") == {f"{down}.attentions.1"}
    assert producers(f"{up}.resnets.0") == {
        INPUT,
        "up_blocks.2.upsamplers.0",
        f"{down}.attentions.1",
    }
    assert producers(f"{up}.resnets.2") == {INPUT, f"{up}.attentions.1"}  # the skip is conv_in's
    assert producers("") == {f"{up}.attentions.2"}


def test_sd15_layers_cut_what_only_they_need(sd15_layers: BlockGraph) -> None:
    """Oracle: the last up block's first ResNet, reused, needs nothing; the other two need skips."""
    row = np.ones(sd15_layers.num_blocks, dtype=np.bool_)
    row[sd15_layers.names.index("up_blocks.3.resnets.0")] = False
    dead = {
        name
        for name, live in zip(sd15_layers.names, sd15_layers.live(row), strict=True)
        if not live
    }
    alive = {"", *(f"down_blocks.0.{k}.{i}" for k in ("resnets", "attentions") for i in (0, 1))}
    alive |= {f"up_blocks.3.{k}.{i}" for k in ("resnets", "attentions") for i in (0, 1, 2)}
    assert dead == set(sd15_layers.names) - alive | {"up_blocks.3.resnets.0"} | {
        "down_blocks.0.attentions.1", "down_blocks.0.resnets.1"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sd15", "dit", "pixart", "sd3", "flux"])
def test_most_of_every_family_can_be_gated(name: str) -> None:
    """At either granularity the ungated rest of the shrunk models is small, and all MACs count."""
    pipe = build(name)
    family = family_of_pipeline(type(pipe).__name__)
    blocks, layers = (graph_of(pipe, family, granularity) for granularity in GRANULARITIES)
    assert max(blocks.blocks[0].macs, layers.blocks[0].macs) < 0.2 * blocks.call_macs()
    assert layers.call_macs() == blocks.call_macs()


def test_sd3_streams_end_with_the_image_alone() -> None:
    graph = graph_at("stabilityai/stable-diffusion-3-medium-diffusers", "block")
    *others, last = graph.blocks[1:]
    assert {block.streams for block in others} == {("encoder_hidden_states", "hidden_states")}
    assert last.streams == ("", "hidden_states")


def test_sd35_medium_has_a_second_attention_in_its_first_thirteen_blocks() -> None:
    graph = graph_at("stabilityai/stable-diffusion-3.5-medium", "layer")
    kinds = Counter(name.split(".")[-1] for name in graph.names[1:])
    assert kinds == {"attn": 24, "attn2": 13, "ff": 24, "ff_context": 23}


def test_flux_gates_single_stream_blocks_whole_at_layers() -> None:
    graph = graph_at("black-forest-labs/FLUX.1-schnell", "layer")
    reuse = {block.name.split(".")[0]: block.reuse for block in graph.blocks[1:]}
    assert reuse == {
        "transformer_blocks": Reuse.OUTPUT, "single_transformer_blocks": Reuse.RESIDUAL
    }  # fmt: skip
    assert len(graph.names) == 1 + 3 * 19 + 38


def test_down_block_outputs_count_once() -> None:
    """Oracle: down_blocks.3 returns its last ResNet's output twice: two tensors of 8 x 8 x 1280."""
    graph = graph_at("stable-diffusion-v1-5/stable-diffusion-v1-5", "block")
    assert graph.blocks[graph.names.index("down_blocks.3")].elements == 2 * 8 * 8 * 1280


def test_find_blocks_refuses_streams_that_an_output_does_not_continue() -> None:
    inputs = {"sample": torch.zeros(1, 4)}
    with pytest.raises(TraceError, match=r"layers\.1 does not continue its arguments input"):
        find_blocks(Narrowing(), inputs=inputs, streams={"layers.*": ("input",)})


def test_find_blocks_reuses_by_output_what_no_stream_is_declared_of() -> None:
    graph = find_blocks(Toy(), inputs=toy_inputs(), streams={"layers.0": ("hidden_states",)})
    assert [block.reuse for block in graph.blocks[1:]] == [
        Reuse.RESIDUAL, Reuse.OUTPUT, Reuse.OUTPUT
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "frozen"), [(torch.float16, True), (torch.float32, False), (torch.bfloat16, True)]
)
def test_find_blocks_needs_neither_dtype_nor_gradients(dtype: torch.dtype, frozen: bool) -> None:
    unet = tiny_unet().to(dtype).requires_grad_(not frozen)
    inputs = {
        "sample": torch.zeros(1, 4, 8, 8, dtype=dtype),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, 5, 16, dtype=dtype),
    }
    graph = find_blocks(unet, inputs=inputs)
    assert graph.producers[0] == (9,)
    assert all(INPUT in producers for producers in graph.producers[1:])
    assert all(p.requires_grad is not frozen for p in unet.parameters())


def test_meta_copy_shares_nothing_and_leaves_attachments_alone() -> None:
    dit = tiny_transformer()
    block = dit.transformer_blocks[0]
    forward = block.__dict__["forward"] = lambda *args, **kwargs: 1 / 0
    hook = block.__dict__["_hf_hook"] = object()
    block.register_forward_hook(lambda *args: 1 / 0)
    twin = meta_copy(dit)
    assert {p.device.type for p in (*twin.parameters(), *twin.buffers())} == {"meta"}
    assert block.__dict__["forward"] is forward
    assert block.__dict__["_hf_hook"] is hook
    copied = twin.get_submodule("transformer_blocks.0")
    assert not {"forward", "_hf_hook"} & set(vars(copied))
    assert not copied._forward_hooks


def test_meta_copy_leaves_a_running_denoiser_as_it_is() -> None:
    dit = tiny_transformer()
    block = dit.transformer_blocks[0]
    block.__dict__["forward"] = lambda *args, **kwargs: 1 / 0
    before, during = dict(vars(block)), []

    class Looking:
        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            during.append(dict(vars(block)))

    dit.__dict__["looking"] = Looking()
    meta_copy(dit)
    assert during == [before]


# toy denoisers ------------------------------------------------------------------------------------


class Layer(nn.Module):
    """A linear layer whose output is a dict or a tuple holding None."""

    def __init__(self, form: str = "tensor", width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)
        self.form = form

    def forward(self, hidden_states: Tensor, extra: dict[str, Tensor] | None = None) -> Any:
        out = self.linear(hidden_states)
        if extra is not None:
            out = out + extra["shift"]
        return {"tensor": out, "dict": {"x": out}, "tuple": (None, out)}[self.form]


def unwrap(out: Any) -> Tensor:
    if isinstance(out, dict):
        return out["x"]
    return out[1] if isinstance(out, tuple) else out


class Toy(nn.Module):
    """Three layers in a list; `mode` picks what goes on between them."""

    def __init__(self, mode: str = "chain", form: str = "tensor") -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(form) for _ in range(3))
        self.mode = mode

    def forward(self, sample: Tensor, extra: dict[str, Tensor] | None = None) -> Tensor:
        x = unwrap(self.layers[0](hidden_states=sample, extra=extra))
        skip = x
        if self.mode == "in-place":
            x += 1
            x.mul_(2)
        x = unwrap(self.layers[1](x))
        if self.mode == "twice":
            x = unwrap(self.layers[1](x))
        if self.mode == "idle":
            return x
        if self.mode == "unread":
            self.layers[2](x)
            return x
        last = unwrap(self.layers[2](x, extra={"shift": skip}))
        if self.mode == "detached":
            return last.detach()
        return sample if self.mode == "bypass" else last


def toy_inputs() -> dict[str, Any]:
    return {"sample": torch.zeros(1, 4), "extra": {"shift": torch.zeros(1, 4)}}


@pytest.mark.parametrize("form", ["tensor", "dict", "tuple"])
@pytest.mark.parametrize("mode", ["chain", "in-place"])
def test_find_blocks_reads_any_module_list(mode: str, form: str) -> None:
    """Oracle: the data flow of Toy.forward, drawn by hand."""
    graph = find_blocks(Toy(mode, form), inputs=toy_inputs())
    assert graph.names == ("", "layers.0", "layers.1", "layers.2")
    assert graph.producers == ((3,), (INPUT,), (1,), (1, 2))


def test_find_blocks_names_the_stream_of_each_output() -> None:
    graph = find_blocks(Toy("chain", "tuple"), inputs=toy_inputs())
    assert graph.blocks[1].streams == ("", "hidden_states")
    assert graph.blocks[1].reuse is Reuse.RESIDUAL


class Narrowing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])

    def forward(self, sample: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](sample))


def test_find_blocks_gives_output_reuse_to_blocks_that_change_shape() -> None:
    graph = find_blocks(Narrowing(), inputs={"sample": torch.zeros(1, 4)})
    assert [block.reuse for block in graph.blocks[1:]] == [Reuse.RESIDUAL, Reuse.OUTPUT]
    assert [block.streams for block in graph.blocks[1:]] == [("input",), ()]


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ("twice", r"layers\.1 runs twice"),
        ("idle", r"layers\.2 never run"),
        ("unread", r"layers\.2 are read by nobody"),
        ("detached", "depends on none of its blocks"),
        ("bypass", "depends on none of its blocks"),
    ],
)
def test_find_blocks_refuses_what_gates_cannot_decide(mode: str, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        find_blocks(Toy(mode), inputs=toy_inputs())


def test_find_blocks_refuses_a_denoiser_without_blocks() -> None:
    with pytest.raises(TraceError, match="no blocks to gate"):
        find_blocks(nn.Linear(4, 4), inputs={"input": torch.zeros(1, 4)})


def test_find_blocks_refuses_an_unknown_granularity() -> None:
    with pytest.raises(TraceError, match="one of block, layer, got 'head'"):
        find_blocks(Toy(), inputs=toy_inputs(), granularity="head")


class Peeking(Toy):
    """A denoiser whose forward looks at values."""

    def forward(self, sample: Tensor, extra: dict[str, Tensor] | None = None) -> Tensor:
        return super().forward(sample * sample.sum().item(), extra)


def test_find_blocks_traces_a_forward_that_looks_at_values_with_values() -> None:
    """Oracle: the same forward that does not look."""
    toy = Peeking()
    toy.layers[0].requires_grad_(False)
    inputs = {"sample": torch.ones(1, 4), "extra": {"shift": torch.ones(1, 4)}}
    graph = find_blocks(toy, inputs=inputs)
    assert graph == replace(find_blocks(Toy(), inputs=inputs), denoiser="Peeking")
    assert [p.requires_grad for p in toy.parameters()] == [False] * 2 + [True] * 4
    assert all("forward" not in vars(layer) for layer in toy.layers)


def test_find_blocks_says_why_a_denoiser_without_values_cannot_be_traced() -> None:
    meta = {"sample": torch.ones(1, 4, device="meta")}
    with pytest.raises(TraceError, match=r"Peeking cannot be traced: .*meta"):
        find_blocks(Peeking(), inputs=meta)


def test_find_blocks_takes_named_modules_only() -> None:
    graph = find_blocks(Toy(), inputs=toy_inputs(), names=("layers.0", "layers.2"))
    assert graph.producers == ((2,), (INPUT,), (1,))
    assert graph.blocks[0].macs == 4 * 4


def test_tracing_twice_gives_the_same_graph(sd15: BlockGraph) -> None:
    known = find_known("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert known is not None
    assert known_graph(known) == sd15
