"""LPIPS. Oracle: torchmetrics' own function around the same classifier."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from tiny_scorers import classifier_weights, random_images, save_classifier
from torchmetrics.functional.image import learned_perceptual_image_patch_similarity

from dipgo_core.errors import EvaluationError, ModelFilesError, UnknownModelError
from dipgo_core.evaluation.lpips import LpipsScorer, load_lpips, lpips_distances
from dipgo_core.evaluation.lpips_files import BACKBONES, Backbone, heads_file
from dipgo_core.evaluation.scorers import lpips_scorer
from dipgo_core.model_files import file_sha256


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("lpips") / "alexnet.pth")


@pytest.fixture(scope="module")
def lpips(file: Path) -> LpipsScorer:
    return load_lpips(f"lpips-alex:{file}")


@pytest.mark.parametrize(("net", "side"), [("alex", 40), ("vgg", 16)])
def test_distance_is_that_of_torchmetrics(net: str, side: int, tmp_path: Path, monkeypatch) -> None:
    file = save_classifier(tmp_path / "classifier.pth", net)
    images, dense = random_images(3, side), random_images(3, side, seed=1)
    name = {"alex": "alexnet", "vgg": "vgg16"}[net]
    model = getattr(torchvision.models, name)()
    model.load_state_dict(classifier_weights(net), strict=False)
    monkeypatch.setattr(torchvision.models, name, lambda weights: model)
    pair = (images.float() / 255, dense.float() / 255)
    expected = learned_perceptual_image_patch_similarity(
        *pair, net_type=net, reduction="none", normalize=True
    )
    monkeypatch.undo()

    found = lpips_distances(load_lpips(f"lpips-{net}:{file}"), images, dense)

    assert found == pytest.approx(expected.numpy(), rel=1e-5)


def test_equal_images_are_exactly_0_apart(lpips: LpipsScorer) -> None:
    images = random_images(2)

    assert lpips_distances(lpips, images, images).tolist() == [0.0, 0.0]


def test_distance_does_not_depend_on_the_batch(lpips: LpipsScorer) -> None:
    images, dense = random_images(20), random_images(20, seed=1)

    whole = lpips_distances(lpips, images, dense)

    assert whole[19:] == pytest.approx(lpips_distances(lpips, images[19:], dense[19:]), rel=1e-5)


def test_published_classifier_is_known_without_its_file(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    scorer = lpips_scorer("lpips-alex")

    assert scorer.digest == f"7be5be79+{file_sha256(heads_file(BACKBONES['lpips-alex']))}"
    place = tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth"
    with pytest.raises(ModelFilesError, match=rf"{place}: fetch .* \(244 MB\)"):
        load_lpips("lpips-alex")


def test_another_file_in_the_place_of_the_published_one_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    save_classifier(tmp_path / "hub" / "checkpoints" / "alexnet-owt-7be5be79.pth")

    with pytest.raises(ModelFilesError, match="not the published file.*not 7be5be79"):
        load_lpips("lpips-alex")


def test_published_classifier_is_the_same_scorer_wherever_it_lies(file: Path, monkeypatch) -> None:
    digest = file_sha256(file)
    there = Backbone("alex", f"alexnet-{digest[:8]}.pth", 1, 31, ())
    monkeypatch.setitem(BACKBONES, "lpips-alex", there)

    assert lpips_scorer(f"lpips-alex:{file}") == lpips_scorer("lpips-alex")


def test_own_classifier_is_known_by_its_bytes(file: Path) -> None:
    assert lpips_scorer(f"lpips-alex:{file}").digest.startswith(file_sha256(file))


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UnknownModelError, match="known are lpips-alex, lpips-vgg.*lpips-alex'"):
        lpips_scorer("lpips-alx")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"features.0.weight": torch.zeros(64, 3, 11, 11)}, "lacks 9 of .*such as features.0.bias"),
        ({k: v[:1] for k, v in classifier_weights("alex").items()}, "has other shapes"),
    ],
)
def test_weights_are_never_left_at_random(weights, message: str, tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "file.pth")

    with pytest.raises(ModelFilesError, match=message):
        load_lpips(f"lpips-alex:{tmp_path / 'file.pth'}")


def test_what_does_not_fit_is_refused(lpips: LpipsScorer) -> None:
    small = random_images(1, side=30)
    with pytest.raises(EvaluationError, match="needs images of 31 x 31 or more, got 30"):
        lpips_distances(lpips, small, small)
    with pytest.raises(EvaluationError, match="images of one shape"):
        lpips_distances(lpips, random_images(2), random_images(1))


def test_distances_that_are_not_finite_are_refused(file: Path) -> None:
    broken = load_lpips(f"lpips-alex:{file}")
    broken.network.lin0.model[-1].weight.fill_(float("nan"))

    with pytest.raises(EvaluationError, match="not finite"):
        lpips_distances(broken, random_images(1), random_images(1))
