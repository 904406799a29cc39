"""FID and KID, against torch-fidelity's own command on the same images as PNG folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from PIL import Image
from torch import Tensor

from dipgo_core.errors import EvaluationError, ModelFilesError
from dipgo_core.evaluation.fid import (
    FeatureExtractor,
    fid_figures,
    folder_reference,
    kid_figure,
    load_extractor,
)
from dipgo_core.evaluation.reference import Reference, reference_of

GROUPS = np.arange(96) % 48


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return load_extractor("tiny-features")


def blobs(seed: int, count: int, tint: float) -> Tensor:
    """Smooth coloured noise, uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = (
        torch.rand(count, 3, 4, 4, generator=generator)
        * torch.tensor([1.0, tint, tint])[:, None, None]
    )
    images = torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") * 255
    return images.to(torch.uint8)


def save(images: Tensor, folder: Path) -> Path:
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(scope="module")
def by_torch_fidelity(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    root = tmp_path_factory.mktemp("images")
    ours, real = save(blobs(0, 96, 0.8), root / "ours"), save(blobs(1, 120, 0.6), root / "real")
    metrics = torch_fidelity.calculate_metrics(
        input1=str(ours),
        input2=str(real),
        feature_extractor="tiny-features",
        fid=True,
        kid=True,
        kid_subset_size=48,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    return real, metrics


def test_fid_and_kid_equal_torch_fidelity(extractor, by_torch_fidelity) -> None:
    real, expected = by_torch_fidelity
    features, reference = extractor(blobs(0, 96, 0.8)), folder_reference(real, extractor)

    fid = fid_figures(features, reference, GROUPS)["fid"]
    kid = kid_figure(features, reference, GROUPS, subset_size=48)

    assert fid.value == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    assert kid.value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-6)
    assert (fid.n, kid.n, fid.scorer) == (96, 96, "tiny-features")


def test_fid_from_moments_alone_is_the_same(extractor, by_torch_fidelity) -> None:
    real, expected = by_torch_fidelity
    whole = folder_reference(real, extractor)
    moments = Reference("statistics:x", whole.scorer, whole.n, whole.mean, whole.covariance)

    fid = fid_figures(extractor(blobs(0, 96, 0.8)), moments, GROUPS)["fid"]

    assert fid.value == pytest.approx(expected["frechet_inception_distance"], rel=1e-4)
    with pytest.raises(EvaluationError, match="hold only moments"):
        kid_figure(extractor(blobs(0, 96, 0.8)), moments, GROUPS, subset_size=48)


def test_fid_has_an_interval_only_where_it_can_be_trusted(extractor) -> None:
    rng = np.random.default_rng(0)
    reference = reference_of(rng.normal(size=(500, 8)), extractor.scorer, paired=False)
    features = rng.normal(size=(64, 8)).astype(np.float32)

    enough = fid_figures(features, reference, np.arange(64))["fid"]
    too_few = fid_figures(features[:31], reference, np.arange(31))["fid"]

    assert enough.low <= enough.value <= enough.high
    assert (too_few.low, too_few.high) == (None, None)


def test_fid_infinity_is_shown_with_fid_where_there_are_enough_images(extractor) -> None:
    # oracle: two equal Gaussians, whose distance is 0; what FID shows is bias
    rng = np.random.default_rng(0)
    reference = reference_of(rng.normal(size=(20_000, 8)), extractor.scorer, paired=False)
    features = rng.normal(size=(64, 8)).astype(np.float32)

    enough = fid_figures(features, reference, np.arange(64))
    too_few = fid_figures(features[:63], reference, np.arange(63))

    assert (list(enough), list(too_few)) == (["fid", "fid_infinity"], ["fid"])
    fid, infinity = enough["fid"], enough["fid_infinity"]
    assert infinity.value < 0.3 * fid.value
    assert fid.low == infinity.low == 0
    assert infinity.low <= infinity.value <= infinity.high < fid.high == fid.value


def test_kid_interval_contains_its_value(extractor) -> None:
    reference = reference_of(extractor(blobs(1, 96, 0.6)), extractor.scorer)

    kid = kid_figure(extractor(blobs(0, 96, 0.8)), reference, GROUPS, subset_size=48)

    assert kid.low < kid.value < kid.high


def test_equal_images_are_at_distance_zero(extractor) -> None:
    features = extractor(blobs(0, 96, 0.8))
    reference = reference_of(features, extractor.scorer)

    assert fid_figures(features, reference, GROUPS)["fid"].value == pytest.approx(0, abs=1e-3)


def test_features_do_not_depend_on_the_batch(extractor) -> None:
    images = blobs(0, 5, 0.8)

    assert extractor(images[3:]) == pytest.approx(extractor(images)[3:], abs=1e-5)


@pytest.mark.parametrize(
    ("columns", "rows", "rule"),
    [(3, 96, "do not fit a reference"), (64, 95, "96 images, there are 95"), (64, 1, "at least 2")],
)
def test_features_that_do_not_fit_are_refused(extractor, columns, rows, rule) -> None:
    reference = reference_of(extractor(blobs(1, 96, 0.6)), extractor.scorer)
    features = np.ones((rows, columns), dtype=np.float32)

    with pytest.raises(EvaluationError, match=rule):
        fid_figures(features, reference, np.arange(rows))


def test_subsets_larger_than_either_side_are_refused(extractor) -> None:
    rng = np.random.default_rng(0)
    reference = reference_of(rng.normal(size=(20, 4)), extractor.scorer, paired=False)

    for size, rule in ((21, "reference has 20"), (15, "there are 10 images")):
        with pytest.raises(EvaluationError, match=rule):
            kid_figure(rng.normal(size=(10, 4)), reference, np.arange(10), subset_size=size)


def test_images_of_another_type_are_refused(extractor) -> None:
    with pytest.raises(EvaluationError, match="need uint8 images"):
        extractor(torch.zeros(1, 3, 32, 32))


def test_unreadable_reference_image_is_named(extractor, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"no image")

    with pytest.raises(EvaluationError, match=r"torn.png"):
        folder_reference(tmp_path, extractor)


def test_corrupt_bundled_weights_are_one_clear_error(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    for module in ("fid", "scorers"):
        monkeypatch.setattr(f"dipgo_core.evaluation.{module}.zoo_path", lambda name: tmp_path)

    with pytest.raises(ModelFilesError, match="weights of tiny-features cannot be read"):
        load_extractor("tiny-features")
