"""What FID and KID compare with: the dense images, shipped statistics, or a folder. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.fid_intervals import moments
from dipgo_core.evaluation.scorers import Scorer, file_sha256, folder_sha256

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
    image_files(folder)
    return f"folder:{folder_sha256(folder)}"


def image_files(folder: Path) -> list[Path]:
    """Return the images of a folder (its own, not those of folders in it), in order of path.

    Raises:
        EvaluationError: no such folder, or no images in it.
    """
    found = folder.iterdir() if folder.is_dir() else iter(())
    files = sorted(path.resolve() for path in found if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise EvaluationError(
            f"no reference images in {folder}: expected {', '.join(sorted(IMAGE_SUFFIXES))} files"
        )
    return files


def load_statistics(path: Path, scorer: Scorer) -> Reference:
    """Read feature statistics: `path` (safetensors) and the facts beside it (.json).

    Raises:
        EvaluationError: missing, torn, of unequal dimensions, or made by another extractor.
    """
    facts = _read_facts(path.with_suffix(".json"))
    _check_extractor(path, facts, scorer)
    tensors = _read_tensors(path)
    digest = file_sha256(path)
    if facts.get("statistics_sha256", digest) != digest:
        raise EvaluationError(f"{path} is not the file its .json describes: copy both again")
    dim = len(tensors["mean"])
    features = tensors.get("features")
    if tensors["covariance"].shape != (dim, dim) or (
        features is not None and features.shape[1:] != (dim,)
    ):
        raise EvaluationError(f"{path}: mean, covariance and features have unequal dimensions")
    return Reference(
        id=f"statistics:{digest}",
        scorer=scorer,
        n=int(facts.get("n", 0)) if features is None else len(features),
        mean=tensors["mean"].astype(np.float64),
        covariance=tensors["covariance"].astype(np.float64),
        features=None if features is None else features.astype(np.float32),
    )


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


def _check_extractor(path: Path, facts: Mapping[str, Any], scorer: Scorer) -> None:
    made_by = (facts.get("extractor"), facts.get("extractor_sha256"))
    if made_by != (scorer.id, scorer.digest):
        raise EvaluationError(
            f"{path} was made with {made_by[0]} ({str(made_by[1])[:12]}), this sweep measures with "
            f"{scorer.id} ({scorer.digest[:12]}): two extractors are two scales, make the "
            "statistics again"
        )


def _read_tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise EvaluationError(f"cannot read reference statistics from {path}: {error}") from error
    missing = [name for name in ("mean", "covariance") if name not in tensors]
    if missing:
        raise EvaluationError(f"{path} lacks {', '.join(missing)}; it is no statistics file")
    return dict(tensors)
