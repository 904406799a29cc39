"""Names of tensors, told without loading. Oracles: torch.save's two formats, the networks' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from fidelity import untrained_inception
from safetensors.torch import save_file
from tiny_scorers import save_classifier, save_image_reward

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.image_reward_files import VOCABULARY, WEIGHTS
from dipgo_core.evaluation.inception_files import INCEPTION_TENSORS, inception_file
from dipgo_core.evaluation.lpips_files import BACKBONES, checked_backbone
from dipgo_core.evaluation.scorers import image_reward_scorer
from dipgo_core.evaluation.tensor_names import check_tensors, tensor_names

TENSORS = {"a.weight": torch.zeros(2), "b": torch.ones(3)}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("zipped", [True, False])
def test_names_of_both_formats_of_torch_are_found(tmp_path: Path, zipped: bool) -> None:
    torch.save(TENSORS, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    check_tensors([tmp_path / "x.pth"], TENSORS, "it")
    with pytest.raises(ModelFilesError, match=r"x\.pth lacks 1 of the tensors of it, such as c:"):
        check_tensors([tmp_path / "x.pth"], [*TENSORS, "c"], "it")


def test_names_are_those_of_all_shards(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in TENSORS]
    for path, (name, value) in zip(paths, TENSORS.items(), strict=True):
        save_file({name: value}, path)
    check_tensors(paths, TENSORS, "it")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0, 40, 200])
def test_torn_file_is_refused(tmp_path: Path, zipped: bool, kept: int) -> None:
    torch.save(TENSORS, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:kept])
    with pytest.raises(ModelFilesError, match=r"x\.pth cannot be read"):
        tensor_names(tmp_path / "x.pth")


@pytest.mark.parametrize("data", [b"xx", bytes(700), b"PK" + bytes(700), b"\x80\x02K\x01."])
def test_what_torch_did_not_write_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(ModelFilesError, match=r"x\.pth cannot be read"):
        tensor_names(tmp_path / "x.pth")


@pytest.mark.parametrize(("name", "net"), [("lpips-alex", "alexnet"), ("lpips-vgg", "vgg16")])
def test_tensors_of_classifiers_are_torchvisions(name: str, net: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, net)().state_dict()
    assert set(BACKBONES[name].tensors) == {k for k in state if k.startswith("features.")}


def test_named_classifier_is_checked_unloaded(tmp_path: Path) -> None:
    alex = save_classifier(tmp_path / "alexnet.pth")
    assert checked_backbone(f"lpips-alex:{alex}") == alex
    with pytest.raises(ModelFilesError, match=r"classifier of lpips-vgg:.*such as features\.12\.b"):
        checked_backbone(f"lpips-vgg:{alex}")


@pytest.mark.slow
def test_tensors_of_inception_are_torch_fidelitys(tmp_path: Path) -> None:
    archive = untrained_inception(tmp_path / "own.pth")
    state = torch.load(archive, weights_only=True)
    assert {k for k in state if not k.endswith("num_batches_tracked")} == INCEPTION_TENSORS
    assert inception_file(f"inception-v3-compat:{archive}") == archive


def test_another_network_is_no_inception(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    with pytest.raises(
        ModelFilesError, match=r"of inception-v3-compat, such as Conv2d_1a_3x3\.bn\.b"
    ):
        inception_file(f"inception-v3-compat:{tmp_path / 'x.safetensors'}")


@pytest.mark.parametrize(
    ("file", "data", "rule"),
    [
        (WEIGHTS, b"xx", rf"{WEIGHTS} cannot be read"),
        (VOCABULARY, b"", r"vocab\.txt has 0 words without \[PAD\]"),
    ],
)
def test_what_is_no_image_reward_is_refused_unloaded(
    tmp_path: Path, file: str, data: bytes, rule: str
) -> None:
    save_image_reward(tmp_path)
    assert image_reward_scorer(str(tmp_path)).id == tmp_path.name
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ModelFilesError, match=rule):
        image_reward_scorer(str(tmp_path))
