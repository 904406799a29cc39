"""Scorers: ids and digests that change with the weights, and files that are missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dipgo_core.errors import ModelFilesError, UnknownModelError
from dipgo_core.evaluation.inception_files import INCEPTION_SHA256
from dipgo_core.evaluation.scorers import (
    clip_scorer,
    dino_scorer,
    features_scorer,
    hub_scorer,
    network_folder,
)
from dipgo_core.zoo import zoo_path


def test_tiny_features_is_known_by_its_weights() -> None:
    weights = zoo_path("tiny-features") / "model.safetensors"

    scorer = features_scorer("tiny-features")

    assert scorer.digest == hashlib.sha256(weights.read_bytes()).hexdigest()


def test_published_inception_is_known_without_its_file() -> None:
    assert features_scorer("inception-v3-compat").digest == INCEPTION_SHA256


def test_own_inception_is_known_by_its_bytes(tmp_path: Path) -> None:
    file = tmp_path / "own.pth"
    file.write_bytes(b"weights")

    scorer = features_scorer(f"inception-v3-compat:{file}")

    assert scorer.id == "inception-v3-compat"
    assert scorer.digest == hashlib.sha256(b"weights").hexdigest()


def test_unknown_feature_scorer_lists_the_known_ones() -> None:
    with pytest.raises(UnknownModelError, match="Did you mean 'tiny-features'"):
        features_scorer("tiny-feature")


def test_hub_clip_is_known_by_id_and_revision() -> None:
    assert clip_scorer("owner/clip@abc") == replace(
        clip_scorer("owner/clip"), digest="hub:owner/clip@abc"
    )
    assert clip_scorer("owner/clip").digest == "hub:owner/clip@main"
    assert network_folder("owner/clip") is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/clip", True),
        ("owner/clip@main", True),
        ("tiny-clip", False),
        ("inception-v3-compat", False),
        ("inception-v3-compat:weights/own.pth", False),
    ],
)
def test_hub_scorers_are_told_from_others(name: str, expected: bool) -> None:
    assert hub_scorer(name) is expected


def test_network_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"config.json is missing"):
        clip_scorer(str(tmp_path))


def test_open_clip_folder_of_a_pickle_is_refused_with_the_way_out(tmp_path: Path) -> None:
    model = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelFilesError, match=r"is a pickle, .*write open_clip_model\.safetensors"):
        clip_scorer(str(tmp_path))


def test_clip_of_open_clip_is_no_dinov2(tmp_path: Path) -> None:
    model = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(ModelFilesError, match="dino scorer must be a dinov2.*holds a open_clip"):
        dino_scorer(str(tmp_path))


@pytest.mark.parametrize(("change", "same"), [("README.md", True), ("config.json", False)])
def test_folder_is_known_by_the_files_that_are_loaded(
    tmp_path: Path, change: str, same: bool
) -> None:
    folder = shutil.copytree(zoo_path("tiny-clip"), tmp_path / "clip")
    before = clip_scorer(str(folder)).digest
    with (folder / change).open("a") as stream:
        stream.write("\n")

    assert (clip_scorer(str(folder)).digest == before) is same


def test_bundled_clip_keeps_its_digest() -> None:
    digest = "1bf337c4be32b9081e868cb14158b31df960e12df1078ecc11d957a44b1c19e3"
    assert clip_scorer("tiny-clip").digest == digest  # stored results are known by it
