"""References: statistics that are written and read back, and those that must be refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.reference import (
    Reference,
    check_folder,
    check_statistics,
    folder_id,
    image_files,
    load_statistics,
    reference_of,
    save_statistics,
    statistics_id,
)
from dipgo_core.evaluation.scorers import Scorer, features_scorer
from dipgo_core.zoo import reference_statistics_path

SCORER = Scorer("own", "a" * 64, "none")


@pytest.fixture
def reference() -> Reference:
    rows = np.random.default_rng(0).normal(size=(20, 3))
    return reference_of(rows, SCORER, paired=False)


def test_moments_are_those_of_numpy(reference: Reference) -> None:
    assert reference.mean == pytest.approx(reference.features.mean(axis=0))
    assert reference.covariance == pytest.approx(np.cov(reference.features.T))


def test_statistics_come_back_as_written(tmp_path: Path, reference: Reference) -> None:
    path = tmp_path / "real.safetensors"
    save_statistics(path, reference, images="drawn")

    again = load_statistics(path, SCORER)

    assert again.id == statistics_id(path)
    assert (again.n, again.paired) == (20, False)
    assert np.array_equal(again.features, reference.features)
    assert np.array_equal(again.covariance, reference.covariance)
    assert not list(tmp_path.glob(".*"))


def test_torn_edited_and_missing_statistics_are_refused(
    tmp_path: Path, reference: Reference
) -> None:
    path = tmp_path / "s.safetensors"
    with pytest.raises(EvaluationError, match="which tells their extractor"):
        load_statistics(path, SCORER)
    save_statistics(path, reference, images="drawn")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(EvaluationError, match="cannot read reference statistics"):
        load_statistics(path, SCORER)


def test_statistics_that_their_facts_do_not_describe_are_refused(
    tmp_path: Path, reference: Reference
) -> None:
    path = tmp_path / "s.safetensors"
    save_statistics(path, reference, images="drawn")
    facts = path.with_suffix(".json")
    facts.write_text(json.dumps({**json.loads(facts.read_text()), "statistics_sha256": "0"}))

    with pytest.raises(EvaluationError, match="not the file its .json describes"):
        load_statistics(path, SCORER)


@pytest.mark.parametrize(
    ("other", "rule"),
    [
        (Scorer("other", "a" * 64, "none"), "two extractors are two scales"),
        (Scorer("own", "b" * 64, "none"), "two extractors are two scales"),
        (Scorer("own", "a" * 64, "bicubic"), "resized by 'none', own here sees them by 'bicubic'"),
    ],
    ids=["extractor", "weights", "resize"],
)
def test_statistics_of_another_scale_are_refused_before_anything_is_read(
    tmp_path: Path, reference: Reference, other: Scorer, rule: str
) -> None:
    path = tmp_path / "s.safetensors"
    save_statistics(path, reference, images="drawn")

    for check in (check_statistics, load_statistics):
        with pytest.raises(EvaluationError, match=rule):
            check(path, other)


def test_checked_statistics_have_the_id_they_are_loaded_with(
    tmp_path: Path, reference: Reference
) -> None:
    path = tmp_path / "s.safetensors"
    save_statistics(path, reference, images="drawn")

    assert check_statistics(path, SCORER, kid_subset_size=20) == load_statistics(path, SCORER).id


def test_kid_is_refused_without_enough_features(tmp_path: Path, reference: Reference) -> None:
    whole, bare = tmp_path / "s.safetensors", tmp_path / "bare.safetensors"
    save_statistics(whole, reference, images="drawn")
    save_statistics(bare, replace(reference, features=None), images="drawn")

    with pytest.raises(EvaluationError, match=r"subsets of 21 images, .* holds 20"):
        check_statistics(whole, SCORER, kid_subset_size=21)
    with pytest.raises(EvaluationError, match="kid needs the features"):
        check_statistics(bare, SCORER, kid_subset_size=2)


def test_statistics_of_another_dimension_are_refused(tmp_path: Path, reference: Reference) -> None:
    bundled = features_scorer("tiny-features")
    save_statistics(tmp_path / "s.safetensors", replace(reference, scorer=bundled), images="drawn")

    with pytest.raises(EvaluationError, match="tiny-features has 64 features"):
        check_statistics(tmp_path / "s.safetensors", bundled)


STATED = {"extractor": "own", "resize": "none"}


def write_npz(path: Path, **arrays: object) -> Path:
    np.savez(path, **arrays)
    return path


def test_moments_of_an_npz_are_read(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "s.npz", mu=np.arange(3.0), sigma=2 * np.eye(3), extra=np.ones(2))

    identity, found = check_statistics(path, SCORER, **STATED), load_statistics(path, SCORER)

    assert identity == found.id == statistics_id(path)
    assert np.array_equal(found.mean, np.arange(3.0))
    assert np.array_equal(found.covariance, 2 * np.eye(3))
    assert (found.features, found.paired) == (None, False)


@pytest.mark.parametrize(
    ("stated", "rule"),
    [
        ({}, "does not tell what made it"),
        ({**STATED, "extractor": "other"}, "two extractors are two scales"),
        ({**STATED, "resize": "bicubic"}, "another resize is another scale"),
        ({**STATED, "kid_subset_size": 2}, "kid needs the features"),
    ],
    ids=["untold", "extractor", "resize", "kid"],
)
def test_npz_of_another_scale_is_refused(tmp_path: Path, stated: dict, rule: str) -> None:
    path = write_npz(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))

    with pytest.raises(EvaluationError, match=rule):
        check_statistics(path, SCORER, **stated)


@pytest.mark.parametrize(
    ("arrays", "rule"),
    [
        ({"mu": np.zeros(3)}, "cannot read mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"must be \(3,\) and \(3, 3\)"),
        ({"mu": np.full(3, np.nan), "sigma": np.eye(3)}, "not finite"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "cannot read mu and sigma"),
    ],
    ids=["lacking", "dimensions", "nan", "pickle"],
)
def test_damaged_npz_is_refused(tmp_path: Path, arrays: dict, rule: str) -> None:
    with pytest.raises(EvaluationError, match=rule):
        check_statistics(write_npz(tmp_path / "s.npz", **arrays), SCORER, **STATED)


def test_torn_npz_is_refused(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "s.npz", mu=np.zeros(3), sigma=np.eye(3))
    path.write_bytes(path.read_bytes()[:200])

    with pytest.raises(EvaluationError, match="cannot read mu and sigma"):
        check_statistics(path, SCORER, **STATED)


def test_bundled_statistics_fit_the_bundled_extractor() -> None:
    reference = load_statistics(reference_statistics_path(), features_scorer("tiny-features"))

    assert reference.n == 10_000
    assert reference.mean == pytest.approx(reference.features.mean(axis=0), abs=1e-3)


def test_folder_is_listed_in_order_and_known_by_its_bytes(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_text(name)
    first = folder_id(tmp_path)

    assert [file.name for file in image_files(tmp_path)] == ["a.JPG", "b.png"]
    (tmp_path / "notes.txt").write_text("changed")
    assert folder_id(tmp_path) == first
    (tmp_path / "b.png").write_text("changed")
    assert folder_id(tmp_path) != first


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no reference images"):
        folder_id(tmp_path)
    with pytest.raises(EvaluationError, match="no reference images"):
        image_files(tmp_path / "missing")


def folder_of(tmp_path: Path, count: int) -> Path:
    for index in range(count):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
    return tmp_path


@pytest.mark.parametrize(
    ("count", "subset", "rule"),
    [(3, 4, "kid draws subsets of 4 images, .* holds 3"), (1, 0, "needs at least 2 images")],
)
def test_folder_of_too_few_images_is_refused(
    tmp_path: Path, count: int, subset: int, rule: str
) -> None:
    with pytest.raises(EvaluationError, match=rule):
        check_folder(folder_of(tmp_path, count), kid_subset_size=subset)


def test_folder_of_whole_images_has_the_id_it_is_loaded_with(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 4)
    assert check_folder(folder, kid_subset_size=4) == folder_id(folder)


def test_image_that_cannot_be_read_is_named_before_anything_runs(tmp_path: Path) -> None:
    data = (folder_of(tmp_path, 3) / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(data[:-20])
    with pytest.raises(EvaluationError, match=r"cannot read the reference image .*1\.png"):
        check_folder(tmp_path)
