"""What FID and KID compare with: the dense images, shipped statistics, or a folder. No torch."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.fid_intervals import Moments, moments
from dipgo_core.evaluation.image_file import check_image
from dipgo_core.evaluation.scorers import FEATURE_DIMS, Scorer, files_sha256
from dipgo_core.model_files import file_sha256

KIND = "dipgo.reference"
SCHEMA_VERSION = 1
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})  # those torch-fidelity reads


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of the images that generated ones are compared with.

    id: as in Protocol.reference. features: (m, d) float32, None where only moments are known.
    mean: (d,) and covariance: (d, d), float64. paired: row i belongs to generated image i.
    """

    id: str
    scorer: Scorer
    n: int
    mean: npt.NDArray[np.float64]
    covariance: npt.NDArray[np.float64]
    features: npt.NDArray[np.float32] | None = None
    paired: bool = False


def reference_of(
    features: npt.ArrayLike, scorer: Scorer, *, id: str = "dense", paired: bool = True
) -> Reference:
    """Return the reference made of features; by default the dense images' of the same seeds.

    Raises:
        EvaluationError: fewer than two images.
    """
    rows = np.asarray(features, dtype=np.float32)
    if len(rows) < 2:
        raise EvaluationError(f"a reference needs at least 2 images, got {len(rows)}")
    mean, covariance = moments(rows)
    return Reference(id, scorer, len(rows), mean, covariance, rows, paired)


def statistics_id(path: Path) -> str:
    """Return the reference id of a statistics file, for the protocol."""
    return f"statistics:{file_sha256(path)}"


def folder_id(folder: Path) -> str:
    """Return the reference id of a folder of images, for the protocol.

    Raises:
        EvaluationError: no images in it.
    """
    return f"folder:{files_sha256(folder, [path.name for path in _images(folder)])}"


def check_folder(folder: Path, *, kid_subset_size: int = 0) -> str:
    """Return the reference id of a folder of images, after checking that they are enough and each
    can be read. kid_subset_size: as of `check_statistics`.

    Raises:
        EvaluationError: no images, too few, or some that cannot be read.
    """
    files = image_files(folder)
    if kid_subset_size > len(files):
        raise EvaluationError(
            f"kid draws subsets of {kid_subset_size} images, {folder} holds {len(files)}: lower "
            "evaluate.images, or put more images there"
        )
    if len(files) < 2:
        raise EvaluationError(f"a reference needs at least 2 images, {folder} holds one")
    for path in files:
        check_image(path)
    return folder_id(folder)


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder (its own, not those of folders in it), in order of path.

    Raises:
        EvaluationError: no such folder, or no images in it.
    """
    return sorted(path.resolve() for path in _images(folder))


def _images(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else iter(())
    files = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise EvaluationError(
            f"no reference images in {folder}: expected {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    return files


def load_statistics(path: Path, scorer: Scorer) -> Reference:
    """Read statistics: `path` (safetensors) and the facts beside it (.json), or moments (.npz).

    A .npz holds `mu` and `sigma`, as pytorch-fid, clean-fid and ADM write them; it does not tell
    what made it, so that whoever names it must (`check_statistics`).

    Raises:
        EvaluationError: missing, torn, of other dimensions, or made by another extractor.
    """
    if path.suffix == ".npz":
        mean, covariance = _read_moments(path, scorer)
        return Reference(statistics_id(path), scorer, 0, mean, covariance)
    facts = _checked_facts(path, scorer)
    tensors = _read_tensors(path)
    features = tensors.get("features")
    return Reference(
        id=statistics_id(path),
        scorer=scorer,
        n=int(facts.get("n", 0)) if features is None else len(features),
        mean=tensors["mean"].astype(np.float64),
        covariance=tensors["covariance"].astype(np.float64),
        features=None if features is None else features.astype(np.float32),
    )


def check_statistics(
    path: Path,
    scorer: Scorer,
    *,
    extractor: str = "",
    resize: str = "",
    kid_subset_size: int = 0,
) -> str:
    """Return the reference id of statistics, after all checks that need no images.

    extractor, resize: what a .npz was made with, as its user says. kid_subset_size: images that KID
    draws from the reference, 0 where KID is not measured.

    Raises:
        EvaluationError: missing or damaged, of another extractor, weights, resize or dimension, or
            without the features that KID needs.
    """
    if path.suffix == ".npz":
        _check_stated(path, scorer, extractor, resize)
        _read_moments(path, scorer)
        images = 0
    else:
        _checked_facts(path, scorer)
        images = _shapes(path).get("features", (0,))[0]
    if kid_subset_size and not images:
        raise EvaluationError(
            f"kid needs the features of the reference images, {path} holds only mean and "
            "covariance: leave kid out of evaluate.metrics, or name statistics with features, a "
            "folder of images, or dense"
        )
    if kid_subset_size > images:
        raise EvaluationError(
            f"kid draws subsets of {kid_subset_size} images, {path} holds {images}: lower "
            "evaluate.images, or make statistics of more images"
        )
    return statistics_id(path)


def save_statistics(path: Path, reference: Reference, *, images: str) -> None:
    """Write a reference as statistics that `load_statistics` reads. images: what they show."""
    tensors: dict[str, npt.NDArray[Any]] = {
        "mean": reference.mean,
        "covariance": reference.covariance,
    }
    if reference.features is not None:
        tensors["features"] = reference.features
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary)
    facts = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "images": images,
        "n": reference.n,
        "feature_dim": len(reference.mean),
        "extractor": reference.scorer.id,
        "extractor_sha256": reference.scorer.digest,
        "resize": reference.scorer.resize,
        "statistics_sha256": file_sha256(temporary),
    }
    temporary.replace(path)
    temporary.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path.with_suffix(".json"))


def _read_facts(path: Path) -> Mapping[str, Any]:
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EvaluationError(
            f"reference statistics need {path}, which tells their extractor: {error}"
        ) from error
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise EvaluationError(f"{path} does not describe statistics (kind must be {KIND!r})")
    if facts.get("schema_version") != SCHEMA_VERSION:
        raise EvaluationError(
            f"{path} has schema_version {facts.get('schema_version')!r}, this dipgo-sweep reads "
            f"{SCHEMA_VERSION}"
        )
    return facts


def _checked_facts(path: Path, scorer: Scorer) -> Mapping[str, Any]:
    """Return the facts of a safetensors file that fits them and the scorer."""
    facts = _read_facts(path.with_suffix(".json"))
    _check_extractor(path, facts, scorer)
    shapes = _shapes(path)
    if facts.get("statistics_sha256") != file_sha256(path):
        raise EvaluationError(f"{path} is not the file its .json describes: copy both again")
    missing = [name for name in ("mean", "covariance") if name not in shapes]
    if missing:
        raise EvaluationError(f"{path} lacks {', '.join(missing)}; it is no statistics file")
    _check_dimensions(path, shapes["mean"], shapes["covariance"], scorer)
    if shapes.get("features", (0, *shapes["mean"]))[1:] != shapes["mean"]:
        raise EvaluationError(f"{path}: mean, covariance and features have unequal dimensions")
    return facts


def _check_extractor(path: Path, facts: Mapping[str, Any], scorer: Scorer) -> None:
    made_by = (facts.get("extractor"), facts.get("extractor_sha256"))
    if made_by != (scorer.id, scorer.digest):
        raise EvaluationError(
            f"{path} was made with {made_by[0]} ({str(made_by[1])[:12]}), this sweep measures with "
            f"{scorer.id} ({scorer.digest[:12]}): two extractors are two scales, make the "
            "statistics again"
        )
    if facts.get("resize") != scorer.resize:
        raise _other_resize(path, str(facts.get("resize")), scorer)


def _check_stated(path: Path, scorer: Scorer, extractor: str, resize: str) -> None:
    if not extractor or not resize:
        raise EvaluationError(
            f"{path} does not tell what made it: say so in evaluate.reference, such as "
            f"{{statistics: {path.name}, extractor: {scorer.id}, resize: {scorer.resize}}}"
        )
    if extractor != scorer.id:
        raise EvaluationError(
            f"{path} was made with {extractor}, this sweep measures with {scorer.id}: two "
            "extractors are two scales, name other statistics or another evaluate.scorers.features"
        )
    if resize != scorer.resize:
        raise _other_resize(path, resize, scorer)


def _other_resize(path: Path, found: str, scorer: Scorer) -> EvaluationError:
    return EvaluationError(
        f"{path} shows images resized by {found!r}, {scorer.id} here sees them by "
        f"{scorer.resize!r}: another resize is another scale, make the statistics again"
    )


def _check_dimensions(
    path: Path, mean: tuple[int, ...], covariance: tuple[int, ...], scorer: Scorer
) -> None:
    dim = FEATURE_DIMS.get(scorer.id, mean[0] if mean else 0)
    if mean != (dim,) or covariance != (dim, dim):
        raise EvaluationError(
            f"{path} has a mean of shape {mean} and a covariance of shape {covariance}, "
            f"{scorer.id} has {dim} features: they must be ({dim},) and ({dim}, {dim})"
        )


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"cannot read reference statistics from {path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"cannot read reference statistics from {path}: {error}") from error


def _read_moments(path: Path, scorer: Scorer) -> Moments:
    """Return mean and covariance of a .npz, in float64."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            mean, covariance = (np.asarray(file[name], np.float64) for name in ("mu", "sigma"))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise EvaluationError(
            f"cannot read mu and sigma from {path}: {error}; expected a .npz as pytorch-fid, "
            "clean-fid or ADM write it"
        ) from error
    _check_dimensions(path, mean.shape, covariance.shape, scorer)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise EvaluationError(f"{path} holds values that are not finite: make it again")
    return mean, covariance
