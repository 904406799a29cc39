"""Sizes of models that are files: counted in headers, and what their calls hold by likeness."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tiny import tiny_sd

from dipgo_core.families import find_family
from dipgo_core.families.sizes import known_sizes
from dipgo_core.model_sizes import component_parameters, scorer_bytes, sizes_of
from dipgo_core.zoo import zoo_path

SD = find_family("sd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of no known size."""
    path = tmp_path_factory.mktemp("model") / "own"
    tiny_sd().save_pretrained(path)
    return path


def test_headers_tell_what_the_networks_hold(folder: Path) -> None:
    """Oracle: the networks themselves."""
    pipe = tiny_sd()
    networks = {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    counted = {name: sum(p.numel() for p in one.parameters()) for name, one in networks.items()}
    assert dict(component_parameters(folder)) == counted


def test_a_model_of_no_known_size_has_weights_alone(folder: Path) -> None:
    sizes = sizes_of("own/model", folder, SD)
    assert sizes is not None
    assert sizes.denoiser == component_parameters(folder)["unet"]
    assert not sizes.calls and sizes.decode is None and not sizes.like


def test_a_model_with_the_networks_of_a_known_one_is_like_it(tmp_path: Path) -> None:
    copied = shutil.copytree(zoo_path("tiny-sd"), tmp_path / "tuned")
    sizes, known = sizes_of(str(copied), copied, SD), known_sizes()["tiny-sd"]
    assert sizes is not None and sizes.like == "tiny-sd"
    assert (sizes.calls, sizes.decode, sizes.side) == (known.calls, known.decode, known.side)


def test_files_of_tiny_sd_hold_what_its_literals_say() -> None:
    counted, known = component_parameters(zoo_path("tiny-sd")), known_sizes()["tiny-sd"]
    assert (counted["unet"], counted["text_encoder"], counted["vae"]) == (
        known.denoiser,
        known.text,
        known.decoder,
    )


def test_nobody_knows_a_model_that_is_not_here() -> None:
    assert sizes_of("some/model", None, SD) is None


def test_damaged_files_tell_nothing(folder: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(folder, tmp_path / "torn")
    (torn / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    assert sizes_of("own/model", torn, SD) is None


def test_scorers_are_known_counted_or_unknown() -> None:
    clip = zoo_path("tiny-clip") / "model.safetensors"
    assert scorer_bytes("tiny-clip") == pytest.approx(2 * clip.stat().st_size, rel=0.1)  # float16
    assert scorer_bytes("facebook/dinov2-base@main") == 4 * 86_600_000
    assert scorer_bytes("some/scorer") is None


def test_a_single_file_is_counted_by_the_names_of_its_tensors(tmp_path: Path) -> None:
    """Tensors of no network of the pipeline, such as averaged weights, do not count."""
    file = tmp_path / "model.safetensors"
    prefixes = ("model.diffusion_model.", "cond_stage_model.", "first_stage_model.", "model_ema.")
    tensors = {f"{name}x": np.zeros((n, 2)) for n, name in enumerate(prefixes, start=1)}
    save_file(tensors, file)
    sizes = sizes_of(str(file), None, SD)
    assert sizes is not None and (sizes.denoiser, sizes.text, sizes.decoder) == (2, 4, 6)
