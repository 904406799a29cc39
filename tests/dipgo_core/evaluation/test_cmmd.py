"""CMMD's embeddings. Oracle: transformers' own CLIP image tower, called by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_scorers import random_images, save_clip, save_clip_tower, save_dinov2
from transformers import CLIPModel, CLIPVisionModelWithProjection
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dipgo_core.errors import EvaluationError, ModelFilesError
from dipgo_core.evaluation.cmmd import CmmdEmbedder, load_cmmd
from dipgo_core.evaluation.scorers import cmmd_scorer, files_sha256


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_tower(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def embedder(folder: Path) -> CmmdEmbedder:
    return load_cmmd(str(folder))


def pixels_of(images: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images / 255 - mean) / std


@torch.no_grad()
def test_embeddings_are_the_towers_own_at_unit_length(embedder, folder: Path) -> None:
    images = random_images(3, side=16)  # the tower's own size
    output = CLIPVisionModelWithProjection.from_pretrained(folder)(pixels_of(images))
    expected = output.image_embeds / output.image_embeds.norm(dim=-1, keepdim=True)

    found = embedder(images)

    assert found.dtype == np.float32
    assert found == pytest.approx(expected.numpy(), abs=1e-6)


@torch.no_grad()
def test_a_whole_clip_gives_its_own_image_features(tmp_path: Path) -> None:
    save_clip(tmp_path)
    images = random_images(2, side=16)
    features = CLIPModel.from_pretrained(tmp_path).get_image_features(pixels_of(images))
    expected = torch.nn.functional.normalize(features.pooler_output, dim=-1)

    assert load_cmmd(str(tmp_path))(images) == pytest.approx(expected.numpy(), abs=1e-6)


def test_the_whole_image_is_seen_not_its_middle(embedder: CmmdEmbedder) -> None:
    wide = random_images(1, side=64)[:, :, :32]
    other = wide.clone()
    other[:, :, :, :8] = 255 - other[:, :, :, :8]  # a centre crop would lose this edge

    assert np.abs(embedder(wide) - embedder(other)).max() > 1e-3


def test_embedding_does_not_depend_on_the_batch(embedder: CmmdEmbedder) -> None:
    images = random_images(40)

    assert embedder(images)[35:] == pytest.approx(embedder(images[35:]), abs=1e-6)


def test_the_bundled_clip_serves(tmp_path: Path) -> None:
    embedder = load_cmmd("tiny-clip")

    assert embedder.scorer == cmmd_scorer("tiny-clip")
    assert np.linalg.norm(embedder(random_images(2)), axis=1) == pytest.approx(1)


def test_folder_is_known_by_its_files(folder: Path) -> None:
    scorer = cmmd_scorer(str(folder))

    assert scorer.digest == files_sha256(folder, [path.name for path in folder.iterdir()])
    assert scorer.resize == "antialiased bicubic to the model's square"


def test_another_kind_of_network_is_refused(tmp_path: Path) -> None:
    save_dinov2(tmp_path)

    with pytest.raises(ModelFilesError, match="must be a clip or clip_vision_model.*a dinov2"):
        load_cmmd(str(tmp_path))


def test_torn_weights_are_one_clear_error(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"torn")

    with pytest.raises(ModelFilesError, match=r"damaged weights: .*model\.safetensors"):
        cmmd_scorer(str(tmp_path))


def test_embeddings_that_are_not_finite_are_refused(folder: Path) -> None:
    broken = load_cmmd(str(folder))
    broken.model.visual_projection.weight.fill_(float("inf"))

    with pytest.raises(EvaluationError, match="not finite"):
        broken(random_images(1))
