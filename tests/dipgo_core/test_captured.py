"""A pipeline in no family: AuraFlow, built tiny, whose denoiser has two lists of blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from auraflow import tiny_auraflow

from dipgo_core.binding import subnet_of
from dipgo_core.captured import captured_inputs, example_call
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import TraceError
from dipgo_core.gates import GateTable
from dipgo_core.graph import INPUT, Reuse
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, load_model, loaded_model
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import Batch, call_arguments, decode, rollout, set_sampler

SAMPLER = SamplerSettings(scheduler="flow_match_euler", steps=4, guidance_scale=3.0)
BATCH = Batch((Item("a cat"), Item("a dog")), (1, 2))


@pytest.fixture(scope="module")
def aura() -> LoadedModel:
    settings = ModelSettings(id="aura", resolution=64)
    model = loaded_model(tiny_auraflow(), settings, weights_sha256="0" * 64)
    set_sampler(model, SAMPLER)
    return model


def stock_images(model: LoadedModel) -> torch.Tensor:
    images: torch.Tensor = model.pipe(
        **call_arguments(model, BATCH.items, BATCH.seeds, SAMPLER)
    ).images
    return images


def test_blocks_are_the_entries_of_the_module_lists(aura: LoadedModel) -> None:
    """Oracle: AuraFlow's forward: joint blocks over two streams, then single ones over both."""
    graph = block_graph(aura)
    joint, single = "joint_transformer_blocks", "single_transformer_blocks"
    assert graph.names == ("", f"{joint}.0", f"{joint}.1", f"{single}.0", f"{single}.1")
    assert graph.producers == ((INPUT, 4), (INPUT,), (INPUT, 1), (INPUT, 2), (INPUT, 3))
    assert {block.reuse for block in graph.blocks[1:]} == {Reuse.RESIDUAL}
    assert graph.blocks[1].streams == ("encoder_hidden_states", "hidden_states")


def test_inputs_have_the_size_that_the_settings_ask_for(aura: LoadedModel) -> None:
    call = {**example_call(aura.pipe), "height": 128, "width": 128}
    assert captured_inputs(aura.pipe, "transformer", call)["hidden_states"].shape == (1, 4, 16, 16)


def test_rollout_is_the_stock_call(aura: LoadedModel) -> None:
    images = decode(aura, rollout(aura, BATCH, SAMPLER))
    assert torch.equal(images, stock_images(aura))


def test_subnet_of_all_gates_changes_nothing_and_another_one_something(aura: LoadedModel) -> None:
    dense, graph = stock_images(aura), block_graph(aura)
    pruned = np.array([[1] * 5, [1, 0, 1, 0, 1], [0] * 5, [1, 1, 0, 0, 1]], dtype=np.bool_)
    for keep, same in ((np.ones_like(pruned), True), (pruned, False)):
        subnet = subnet_of(aura, graph, SAMPLER, GateTable(keep))
        assert subnet.model["family"] == "AuraFlowPipeline.transformer.AuraFlowTransformer2DModel"
        set_sampler(aura, SAMPLER)
        with apply_subnet(aura.pipe, subnet):
            assert torch.equal(stock_images(aura), dense) == same


def test_a_saved_pipeline_in_no_family_loads(aura: LoadedModel, tmp_path: Any) -> None:
    aura.pipe.save_pretrained(tmp_path)
    loaded = load_model(ModelSettings(id=str(tmp_path), resolution=64))
    set_sampler(loaded, SAMPLER)
    assert loaded.family.name == aura.family.name
    assert torch.equal(stock_images(loaded), stock_images(aura))


def test_its_layers_are_unknown(aura: LoadedModel) -> None:
    with pytest.raises(TraceError, match="AuraFlowPipeline is in no family.*granularity block"):
        block_graph(aura, "layer")


class Uncallable:
    """A pipeline that fails before its denoiser, or never reaches it."""

    def __init__(self, *, fails: Exception | None) -> None:
        self.fails = fails
        self.transformer = torch.nn.Linear(2, 2)

    def __call__(self, prompt: str) -> None:
        if self.fails is not None:
            raise self.fails


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (ValueError("an image"), "Uncallable cannot be called with prompt .*is given: an image"),
        (AttributeError("no vae"), "Uncallable cannot be called with prompt .*is given: no vae"),
        (KeyError("depth"), "Uncallable cannot be called with prompt .*is given: 'depth'"),
        (None, "Uncallable ended without calling its transformer"),
    ],
)
def test_a_pipeline_that_tells_nothing_is_refused(fails: Exception | None, message: str) -> None:
    pipe = Uncallable(fails=fails)
    with pytest.raises(TraceError, match=message):
        captured_inputs(pipe, "transformer", example_call(pipe))
