"""Outlines: graphs from configs alone equal those of the loaded models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from auraflow import tiny_auraflow
from fake_hub import FakeHub

from dipgo_core.blocks import known_graph
from dipgo_core.config import ModelSettings
from dipgo_core.errors import ConfigError, ModelFilesError, UnknownModelError
from dipgo_core.families import find_known
from dipgo_core.outline import outline_of
from dipgo_core.pipelines import block_graph, load_model
from dipgo_core.zoo import zoo_path


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-dit"])
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_outline_of_a_folder_is_the_graph_of_the_loaded_model(name: str, granularity: str) -> None:
    folder = str(zoo_path(name))  # type: ignore[arg-type]
    outline = outline_of(folder, granularity=granularity)
    loaded = load_model(ModelSettings(id=folder))
    assert outline.graph == block_graph(loaded, granularity)
    assert (outline.family.name, outline.resolution) == (loaded.family.name, loaded.resolution)


def test_outline_of_a_known_model_needs_no_files() -> None:
    known = find_known("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert known is not None
    outline = outline_of(known.id)
    assert (outline.graph, outline.resolution) == (known_graph(known), known.resolution)


def test_resolution_scales_activations() -> None:
    small, large = (outline_of("tiny-sd", resolution=side).graph for side in (32, 64))
    ratios = [b.elements / a.elements for a, b in zip(small.blocks, large.blocks, strict=True)]
    assert ratios == [4.0] * small.num_blocks


def test_resolution_that_the_model_cannot_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        outline_of("tiny-sd", resolution=36)
    with pytest.raises(ConfigError, match="32 pixels alone"):
        outline_of("tiny-dit", resolution=64)
    with pytest.raises(ConfigError, match="at most 3072 for this model, got 3088"):
        outline_of("stabilityai/stable-diffusion-3-medium-diffusers", resolution=3088)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("stable-diffusion-v1.5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("tinysd", "tiny-sd"),
        ("flux.1-dev", "black-forest-labs/FLUX.1-dev"),
    ],
)
def test_unknown_name_is_refused_with_the_nearest(name: str, meant: str) -> None:
    with pytest.raises(UnknownModelError, match=f"Did you mean '{meant}'"):
        outline_of(name)


def test_hub_id_out_of_reach_names_the_known_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelFilesError, match=r"HF_HUB_OFFLINE.*Did you mean '.*FLUX.1-dev'"):
        outline_of("someone/FLUX.1-dev")


def test_hub_id_is_drawn_from_its_configs_without_weights(fake_hub: FakeHub) -> None:
    files = {
        path.relative_to(zoo_path("tiny-sd")).as_posix(): path.read_bytes()
        for path in zoo_path("tiny-sd").rglob("*.json")
    }
    fake_hub.put("me/model", files)
    assert outline_of("me/model").graph == outline_of("tiny-sd").graph


def test_torn_config_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo_path("tiny-sd"), folder)
    (folder / "unet" / "config.json").write_text(json.dumps({})[:1])
    with pytest.raises(ModelFilesError, match="unet/config.json"):
        outline_of(str(folder))


def test_single_file_points_to_its_base(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(ModelFilesError, match="one file of weights.*`base`"):
        outline_of(str(path))


def test_pipeline_in_no_family_is_drawn_as_one_call_shows_it(tmp_path: Path) -> None:
    """Oracle: two joint blocks and two single ones, as AuraFlow is built."""
    tiny_auraflow().save_pretrained(tmp_path / "aura")
    outline = outline_of(str(tmp_path / "aura"), resolution=64)
    names = [f"{kind}_transformer_blocks.{i}" for kind in ("joint", "single") for i in (0, 1)]
    assert outline.graph.names == ("", *names) and outline.resolution == 64


def test_pipeline_in_no_family_on_the_hub_is_told_to_be_downloaded(
    fake_hub: FakeHub, tmp_path: Path
) -> None:
    tiny_auraflow().save_pretrained(tmp_path)
    fake_hub.put("me/aura", {"model_index.json": (tmp_path / "model_index.json").read_bytes()})
    with pytest.raises(ConfigError, match=r"AuraFlowPipeline.*in no family.*hf download me/aura"):
        outline_of("me/aura")


def test_pipeline_without_a_denoiser_is_refused(tmp_path: Path) -> None:
    named = {"_class_name": "ShapEPipeline", "prior": ["diffusers", "PriorTransformer"]}
    (tmp_path / "model_index.json").write_text(json.dumps(named), "utf-8")
    with pytest.raises(UnknownModelError, match="no family uses the pipeline class 'ShapEPipe"):
        outline_of(str(tmp_path))
