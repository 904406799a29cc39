"""References: statistics that are written and read back, and those that must be refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.reference import (
    Reference,
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


def test_another_extractor_is_refused(tmp_path: Path, reference: Reference) -> None:
    save_statistics(tmp_path / "s.safetensors", reference, images="drawn")

    with pytest.raises(EvaluationError, match="two extractors are two scales"):
        load_statistics(tmp_path / "s.safetensors", Scorer("own", "b" * 64, "none"))


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


def test_bundled_statistics_fit_the_bundled_extractor() -> None:
    reference = load_statistics(reference_statistics_path(), features_scorer("tiny-features"))

    assert reference.n == 10_000
    assert reference.mean == pytest.approx(reference.features.mean(axis=0), abs=1e-3)


def test_folder_is_listed_in_order_and_known_by_its_bytes(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "notes.txt"):
        (tmp_path / name).write_text(name)
    first = folder_id(tmp_path)

    assert [file.name for file in image_files(tmp_path)] == ["a.JPG", "b.png"]
    (tmp_path / "b.png").write_text("changed")
    assert folder_id(tmp_path) != first


def test_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no reference images"):
        folder_id(tmp_path)
    with pytest.raises(EvaluationError, match="no reference images"):
        image_files(tmp_path / "missing")
