"""Models that are not whole pipelines: single files, and denoisers alone, on the base they name."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file import write_single_file
from tiny import DDIM, tiny_sd, tiny_unet
from torch import Tensor

from dipgo_core.config import ModelSettings
from dipgo_core.errors import ModelFilesError
from dipgo_core.items import Item
from dipgo_core.model_base import base_of, single_file
from dipgo_core.model_files import weights_digest
from dipgo_core.pipelines import load_model
from dipgo_core.sampling import Batch, rollout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole")
    tiny_sd().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def configs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder without any weights."""
    path = tmp_path_factory.mktemp("configs") / "base"
    return shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tiny_sd(), tmp_path_factory.mktemp("single") / "tiny.safetensors")


def settings(model: Path, base: Path) -> ModelSettings:
    return ModelSettings(id=str(model), base=str(base))


def latents(of: ModelSettings) -> Tensor:
    return rollout(load_model(of), Batch((Item("a red cat"),), (3,)), DDIM).detach()


def test_a_single_file_makes_what_its_folder_makes(folder: Path, configs: Path, file: Path) -> None:
    assert torch.equal(latents(settings(file, configs)), latents(ModelSettings(id=str(folder))))


def test_a_denoiser_alone_replaces_that_of_its_base(folder: Path, tmp_path: Path) -> None:
    """Oracle: the whole pipeline saved with the other U-Net."""
    other = tiny_unet(upcast_attention=True)
    with torch.no_grad():
        other.conv_out.weight.mul_(1.5)
    other.save_pretrained(tmp_path / "unet")
    base = shutil.copytree(folder, tmp_path / "base")
    expected = shutil.copytree(folder, tmp_path / "expected")
    shutil.rmtree(expected / "unet")
    shutil.copytree(tmp_path / "unet", expected / "unet")
    shutil.rmtree(base / "unet")  # not needed of a base
    alone = settings(tmp_path / "unet", base)
    assert torch.equal(latents(alone), latents(ModelSettings(id=str(expected))))


def test_digest_follows_the_file_and_the_configs_of_the_base(
    folder: Path, configs: Path, file: Path, tmp_path: Path
) -> None:
    digest = weights_digest(settings(file, configs))
    assert weights_digest(settings(file, folder)) == digest  # a base's weights are not read
    changed = shutil.copytree(configs, tmp_path / "changed")
    text = (changed / "scheduler" / "scheduler_config.json").read_text("utf-8")
    (changed / "scheduler" / "scheduler_config.json").write_text(text.replace("0.012", "0.013"))
    assert weights_digest(settings(file, changed)) != digest
    tensors = load_file(file)
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert weights_digest(settings(tmp_path / "other.safetensors", configs)) != digest


def test_a_single_file_that_lacks_tensors_is_refused(
    configs: Path, file: Path, tmp_path: Path
) -> None:
    lost = "model.diffusion_model.out.2.weight"
    save_file({k: v for k, v in load_file(file).items() if k != lost}, tmp_path / "x.safetensors")
    with pytest.raises(ModelFilesError, match="lacks .*`base` a model of its kind"):
        load_model(settings(tmp_path / "x.safetensors", configs))


def test_a_torn_single_file_is_refused_before_it_is_loaded(
    configs: Path, file: Path, tmp_path: Path
) -> None:
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelFilesError, match="damaged weights: .*torn.safetensors"):
        weights_digest(settings(tmp_path / "torn.safetensors", configs))


def test_configs_that_a_base_lacks_are_named(configs: Path, file: Path, tmp_path: Path) -> None:
    base = shutil.copytree(configs, tmp_path / "base")
    (base / "vae" / "config.json").unlink()
    with pytest.raises(ModelFilesError, match=r"lacks vae/\*\.json"):
        load_model(settings(file, base))


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt", "pytorch_model.bin"])
def test_pickles_are_never_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(ModelFilesError, match="is a pickle, .*never is: convert it"):
        single_file(str(tmp_path / name))


def test_a_single_file_needs_a_base(file: Path) -> None:
    with pytest.raises(ModelFilesError, match="one file of weights.*name with `base`"):
        base_of(ModelSettings(id=str(file)))


def test_base_of_a_known_denoiser_is_known_and_may_be_pinned() -> None:
    lcm = ModelSettings(id="latent-consistency/lcm-sdxl", revision="1" * 40)
    base = base_of(lcm)
    assert base == ModelSettings(id="stabilityai/stable-diffusion-xl-base-1.0")
    pinned = base_of(replace(lcm, base=f"{base.id}@{'2' * 40}"))
    assert pinned == replace(base, revision="2" * 40)
    assert weights_digest(lcm) == f"hub:{lcm.id}@{'1' * 40}+hub:{base.id}@main"


def test_base_is_none_where_the_id_is_a_whole_pipeline(folder: Path) -> None:
    assert base_of(ModelSettings(id=str(folder))) is None
    assert base_of(ModelSettings(id="tiny-sd")) is None
