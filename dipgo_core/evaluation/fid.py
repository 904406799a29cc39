"""FID and KID by torch-fidelity, from features. The only import of torch_fidelity.

torch-fidelity's own cache is never used: it is keyed on a name, and a reused name silently gives
the distance to other images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity import (
    FeatureExtractorBase,
    FeatureExtractorInceptionV3,
    register_feature_extractor,
)
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from dipgo_core.errors import DipgoError, EvaluationError, ModelFilesError
from dipgo_core.evaluation.intervals import Figure, fid_jackknife, kid_interval
from dipgo_core.evaluation.reference import Reference, folder_id, image_files, reference_of
from dipgo_core.evaluation.scorers import (
    INCEPTION,
    INCEPTION_SHA256,
    TINY_FEATURES,
    Scorer,
    features_scorer,
    file_sha256,
    inception_file,
)
from dipgo_core.zoo import zoo_path
from dipgo_core.zoo.features import FEATURE_DIM, TinyFeatures

Features = npt.NDArray[np.float32]

KID_SUBSETS = 100
_CHUNK = 64  # images an extractor sees at once


@dataclass(frozen=True, eq=False)
class FeatureExtractor:
    """A loaded feature scorer: uint8 images in, (n, d) float32 features out."""

    scorer: Scorer
    module: Any
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of uint8 images (n, 3, H, W).

        Raises:
            EvaluationError: images of another type, or features that are not finite.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise EvaluationError(
                f"features need uint8 images (n, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        chunks = (images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK))
        parts = [self.module(chunk.to(self.device))[0] for chunk in chunks]
        features = torch.cat(parts).float().cpu().numpy()
        if not np.isfinite(features).all():
            raise EvaluationError(f"{self.scorer.id} returned features that are not finite")
        return np.ascontiguousarray(features)


class TinyFeaturesExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """The bundled extractor as torch-fidelity wants it; the base class is its interface."""

    def __init__(self, name: str, features_list: list[str], **_: object) -> None:
        super().__init__(name, features_list)
        self.network = TinyFeatures.from_pretrained(zoo_path(TINY_FEATURES))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (str(FEATURE_DIM),)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return str(FEATURE_DIM)

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.network(images),)


register_feature_extractor(TINY_FEATURES, TinyFeaturesExtractor)


def load_extractor(name: str, *, device: str | torch.device = "cpu") -> FeatureExtractor:
    """Load the feature scorer `name` (see `features_scorer`).

    Raises:
        UnknownModelError: no scorer has this name.
        ModelFilesError: weights that are missing, corrupt, or not the published ones.
    """
    scorer = features_scorer(name)
    try:
        if scorer.id == TINY_FEATURES:
            module: Any = TinyFeaturesExtractor(TINY_FEATURES, [str(FEATURE_DIM)])
        else:
            module = _inception(inception_file(name), published=name == INCEPTION)
    except DipgoError:
        raise
    except Exception as error:  # each format has its own kinds
        raise ModelFilesError(f"the weights of {name} cannot be read: {error}") from error
    module.eval().requires_grad_(False).to(device)
    return FeatureExtractor(scorer, module, torch.device(device))


def folder_reference(folder: Path, extractor: FeatureExtractor) -> Reference:
    """Return the reference of a folder of images, read as torch-fidelity reads them.

    Raises:
        EvaluationError: no images, or one that cannot be read.
    """
    parts = [extractor(batch) for batch in _read_images(image_files(folder))]
    features = np.concatenate(parts)
    return reference_of(features, extractor.scorer, id=folder_id(folder), paired=False)


def fid_figure(features: Features, reference: Reference, groups: npt.ArrayLike) -> Figure:
    """Return torch-fidelity's FID; with an interval only where n >= 4 x feature dimension.

    groups: (n,) prompt of each image. The interval is that of the bias-corrected jackknife (what
    FID would be without its bias from small n), widened to contain the FID shown.
    """
    check_reference(features, reference)
    value = _fid(features, reference)
    moments = (reference.mean, reference.covariance)
    paired = reference.features if reference.paired else None
    interval = fid_jackknife(
        features, moments if paired is None else paired, groups, paired=paired is not None
    )
    low = None if interval is None else min(interval.low, value)
    high = None if interval is None else max(interval.high, value)
    return Figure(value, low, high, len(features), reference.scorer.id)


def kid_figure(
    features: Features, reference: Reference, groups: npt.ArrayLike, *, subset_size: int
) -> Figure:
    """Return torch-fidelity's KID (mean over 100 subsets) with its interval by prompt.

    Raises:
        EvaluationError: a reference without features, or too small for the subsets.
    """
    check_reference(features, reference)
    known = _kid_features(reference, subset_size)
    if subset_size > len(features):
        raise EvaluationError(
            f"KID draws subsets of {subset_size}, there are {len(features)} images"
        )
    result = kid_features_to_metric(
        torch.from_numpy(features),
        torch.from_numpy(known),
        kid_subsets=KID_SUBSETS,
        kid_subset_size=subset_size,
        verbose=False,
    )
    value = result[KEY_METRIC_KID_MEAN]
    interval = kid_interval(value, features, known, groups, paired=reference.paired)
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return Figure(value, low, high, len(features), reference.scorer.id)


def check_reference(features: Features, reference: Reference) -> None:
    """Check that features and reference fit each other.

    Raises:
        EvaluationError: another feature dimension, too few images, or unpaired rows.
    """
    if features.ndim != 2 or features.shape[1] != len(reference.mean):
        raise EvaluationError(
            f"features of shape {features.shape} do not fit a reference of dimension "
            f"{len(reference.mean)} made with {reference.scorer.id}"
        )
    if len(features) < 2:
        raise EvaluationError(f"FID and KID need at least 2 images, got {len(features)}")
    if reference.paired and len(features) != reference.n:
        raise EvaluationError(
            f"the dense reference has {reference.n} images, there are {len(features)}: both must "
            "come from the same seeds"
        )


def _fid(features: Features, reference: Reference) -> float:
    ours = fid_features_to_statistics(torch.from_numpy(features))
    if reference.features is not None:
        theirs = fid_features_to_statistics(torch.from_numpy(reference.features))
    else:
        theirs = {"mu": reference.mean.astype(ours["mu"].dtype), "sigma": reference.covariance}
    return float(fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID])


def _kid_features(reference: Reference, subset_size: int) -> Features:
    if reference.features is None:
        raise EvaluationError(
            "KID needs the features of the reference images, these statistics hold only moments: "
            "leave kid out of the metrics, or make the statistics with features"
        )
    if subset_size > reference.n:
        raise EvaluationError(
            f"KID draws subsets of {subset_size}, the reference has {reference.n} images"
        )
    return reference.features


def _read_images(files: Iterable[Path]) -> Iterable[Tensor]:
    """One batch an image: sizes may differ; extractors resize."""
    for path in files:
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise EvaluationError(f"cannot read the reference image {path}: {error}") from error
        yield torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]


def _inception(path: Path, *, published: bool) -> FeatureExtractorBase:
    """Build torch-fidelity's Inception from a weights file that was found to hold only tensors."""
    if published and not file_sha256(path).startswith(INCEPTION_SHA256):
        raise ModelFilesError(
            f"{path} is not the published file (its SHA-256 must begin with {INCEPTION_SHA256}): "
            "it may be truncated, fetch it again"
        )
    # The library unpickles whatever the file holds; this refuses anything but tensors first.
    torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return FeatureExtractorInceptionV3(
        INCEPTION, ["2048"], feature_extractor_weights_path=str(path)
    )
