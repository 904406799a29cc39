"""Pipelines: loading reads whole models, and refuses what it cannot read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    DDIM,
    tiny_dit,
    tiny_model,
    tiny_sd,
    tiny_transformer,
)
from torch import Tensor

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import ModelFilesError, UnknownModelError
from dipgo_core.families import find_known
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, load_model, weights_digest
from dipgo_core.sampling import Batch, rollout, set_sampler

ITEMS = (Item("a red cat", 3), Item("the moon", 5))
SEEDS = (11, 12)


def ours(model: LoadedModel, sampler: SamplerSettings) -> Tensor:
    return rollout(model, Batch(ITEMS, SEEDS), sampler)


# loading ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_dit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_load_model_reads_a_saved_pipeline(tmp_path: Path, make: Any) -> None:
    make().save_pretrained(tmp_path)
    model = load_model(ModelSettings(id=str(tmp_path)))
    assert torch.equal(ours(model, DDIM), ours(tiny_model(make()), DDIM))
    assert not model.denoiser.training
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert model.weights_sha256 == weights_digest(model.settings)
    assert getattr(model.pipe, "safety_checker", None) is None


def test_load_model_honours_the_dtype(folder: Path) -> None:
    model = load_model(ModelSettings(id=str(folder), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"


def test_weights_digest_depends_on_contents_only(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("card", "utf-8")
    (copy / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"variant")
    before = weights_digest(ModelSettings(id=str(folder)))
    assert weights_digest(ModelSettings(id=str(copy))) == before
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text("utf-8").replace("0.012", "0.013"), "utf-8")
    assert weights_digest(ModelSettings(id=str(copy))) != before


def test_weights_digest_of_a_hub_id_is_its_revision() -> None:
    settings = ModelSettings(id="owner/name", revision="abc")
    assert weights_digest(settings) == "hub:owner/name@abc"


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", r"lacks transformer/\*\.safetensors"),
        ("vae/config.json", r"lacks vae/\*\.json"),
        ("model_index.json", "not a saved pipeline"),
    ],
)
def test_load_model_names_missing_files(folder: Path, gone: str, message: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(ModelFilesError, match=message):
        load_model(ModelSettings(id=str(folder)))


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("text_encoder/model.safetensors", "final_layer_norm.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_out.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ],
)
def test_load_model_leaves_no_weight_at_random(tmp_path: Path, file: str, tensor: str) -> None:
    tiny_sd().save_pretrained(tmp_path)
    weights = load_file(tmp_path / file)
    lost = {name for name in weights if name.endswith(tensor)}
    kept = {name: value for name, value in weights.items() if name not in lost}
    save_file(kept, tmp_path / file, metadata={"format": "pt"})
    part = re.escape(file.partition("/")[0])
    with pytest.raises(ModelFilesError, match=rf"{part} lack {len(lost)} tensors.*{tensor}"):
        load_model(ModelSettings(id=str(tmp_path)))


def test_load_model_leaves_no_weight_of_a_shard_empty(folder: Path) -> None:
    tiny_transformer().save_pretrained(folder / "transformer", max_shard_size="20KB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    shard = sorted((folder / "transformer").glob("*-00001-of-*.safetensors"))[0]
    name, *kept = sorted(load_file(shard).items())
    save_file(dict(kept), shard, metadata={"format": "pt"})
    with pytest.raises(ModelFilesError, match=f"transformer lack 1 tensors .*{name[0]}"):
        load_model(ModelSettings(id=str(folder)))


def test_load_model_reads_no_pickled_weights(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelFilesError, match=r"vae/\*\.safetensors.*Only safetensors"):
        load_model(ModelSettings(id=str(folder)))


@pytest.mark.parametrize("library", ["own_code", "os"])
def test_load_model_runs_no_code_that_comes_with_a_model(folder: Path, library: str) -> None:
    """Nor does it import what happens to be installed under the name that a model gives."""
    (folder / "scheduler" / "own_code.py").write_text("raise SystemExit('it ran')", "utf-8")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    index["scheduler"] = [library, "DDIMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index), "utf-8")
    with pytest.raises(ModelFilesError, match=f"scheduler from '{library}'.*no code"):
        load_model(ModelSettings(id=str(folder)))


def test_load_model_says_what_to_do_without_network() -> None:
    with pytest.raises(ModelFilesError, match="HF_HUB_OFFLINE.* name a local folder"):
        load_model(ModelSettings(id="facebook/DiT-XL-2-256"))


def test_load_model_refuses_what_is_neither_folder_nor_id() -> None:
    with pytest.raises(ModelFilesError, match="no bundled model, no folder or file here and no"):
        load_model(ModelSettings(id="tiny-sdd"))


def test_load_model_refuses_an_unknown_pipeline(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text("utf-8").replace("DiTPipeline", "FluxxPipeline"), "utf-8")
    with pytest.raises(UnknownModelError, match="FluxxPipeline"):
        load_model(ModelSettings(id=str(folder)))


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-dit"])
def test_a_resolution_that_is_the_models_own_changes_nothing(name: str) -> None:
    plain = load_model(ModelSettings(id=name))
    asked = load_model(ModelSettings(id=name, resolution=plain.resolution))
    assert (asked.resolution, asked.latent_side) == (plain.resolution, plain.latent_side)
    assert asked.size_arguments == plain.size_arguments
    assert block_graph(asked) == block_graph(plain)


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-dit"])
def test_bundled_models_load_and_cost_what_planning_says(name: str) -> None:
    model, known = load_model(ModelSettings(id=name)), find_known(name)
    assert known is not None
    graph = block_graph(model)
    assert (graph.call_macs("all"), graph.call_macs("paper")) == (known.macs, known.macs_paper)
    assert model.family.name == known.family
    assert len(set_sampler(model, known.sampler)) == known.sampler.steps
