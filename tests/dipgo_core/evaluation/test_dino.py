"""DINO distance. Oracle: transformers' own Dinov2, called by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_scorers import random_images, save_clip, save_dinov2
from transformers import BitImageProcessor, Dinov2Model

from dipgo_core.errors import EvaluationError, ModelFilesError
from dipgo_core.evaluation.dino import DinoScorer, dino_distances, load_dino
from dipgo_core.evaluation.scorers import dino_scorer, files_sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dinov2(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def dino(folder: Path) -> DinoScorer:
    return load_dino(str(folder))


@torch.no_grad()
def test_distance_is_one_minus_the_cosine_of_class_tokens(dino: DinoScorer, folder: Path) -> None:
    images, dense = random_images(3), random_images(3, seed=1)
    model, processor = (
        Dinov2Model.from_pretrained(folder),
        BitImageProcessor.from_pretrained(folder),
    )
    ours, theirs = (
        model(**processor(list(part), return_tensors="pt")).last_hidden_state[:, 0]
        for part in (images, dense)
    )
    expected = 1 - torch.cosine_similarity(ours, theirs)

    assert dino_distances(dino, images, dense) == pytest.approx(expected.numpy(), abs=1e-6)


def test_equal_images_are_exactly_0_apart(dino: DinoScorer) -> None:
    images = random_images(2)

    assert dino_distances(dino, images, images).tolist() == [0.0, 0.0]


def test_distance_does_not_depend_on_the_batch(dino: DinoScorer) -> None:
    images, dense = random_images(40), random_images(40, seed=1)

    whole = dino_distances(dino, images, dense)

    alone = dino_distances(dino, images[35:], dense[35:])
    assert whole[35:] == pytest.approx(alone, abs=1e-6)


def test_folder_is_known_by_its_files_and_a_hub_id_by_its_revision(folder: Path) -> None:
    assert dino_scorer(str(folder)).digest == files_sha256(
        folder, [path.name for path in folder.iterdir()]
    )
    assert dino_scorer("facebook/dinov2-base@abc").digest == "hub:facebook/dinov2-base@abc"


def test_another_kind_of_network_is_refused_without_loading_it(tmp_path: Path) -> None:
    save_clip(tmp_path)

    with pytest.raises(ModelFilesError, match=r"must be a dinov2 or .* holds a clip"):
        dino_scorer(str(tmp_path))


def test_weights_are_never_left_at_random(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})

    with pytest.raises(ModelFilesError, match=r"lacks 1 weights of .* \(layernorm.weight\)"):
        load_dino(str(tmp_path))


def test_torn_config_is_one_clear_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({})[:1])

    with pytest.raises(ModelFilesError, match=r"config\.json cannot be read"):
        dino_scorer(str(tmp_path))


def test_offline_hub_id_says_how_to_get_it() -> None:
    with pytest.raises(ModelFilesError, match=r"facebook/dinov2-base[\s\S]*HF_HUB_OFFLINE is set"):
        load_dino("facebook/dinov2-base")


def test_unlike_images_are_refused(dino: DinoScorer) -> None:
    with pytest.raises(EvaluationError, match="images of one shape"):
        dino_distances(dino, random_images(2), random_images(3))
    with pytest.raises(EvaluationError, match="needs uint8 images"):
        dino_distances(dino, random_images(2).float(), random_images(2))


def test_features_that_are_not_finite_are_refused(folder: Path) -> None:
    broken = load_dino(str(folder))
    broken.model.layernorm.weight.fill_(float("nan"))

    with pytest.raises(EvaluationError, match="not finite"):
        dino_distances(broken, random_images(1), random_images(1))
