"""FID and KID by torch-fidelity, from features. The only import of torch_fidelity.

torch-fidelity's own cache is never used: it is keyed on a name, and a reused name silently gives
the distance to other images.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch_fidelity import (
    FeatureExtractorBase,
    FeatureExtractorInceptionV3,
    register_feature_extractor,
)
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import (
    KEY_METRIC_KID_MEAN,
    KEY_METRIC_KID_STD,
    kid_features_to_metric,
)

from dipgo_core.errors import DipgoError, EvaluationError, ModelFilesError
from dipgo_core.evaluation.fid_intervals import fid_infinity, fid_jackknife, moments
from dipgo_core.evaluation.image_file import read_image
from dipgo_core.evaluation.inception import inception_state
from dipgo_core.evaluation.inception_files import INCEPTION
from dipgo_core.evaluation.intervals import Figure
from dipgo_core.evaluation.mmd_intervals import mmd_interval, polynomial_kernel
from dipgo_core.evaluation.reference import Reference, folder_id, image_files, reference_of
from dipgo_core.evaluation.scorers import TINY_FEATURES, Scorer, features_scorer
from dipgo_core.zoo import zoo_path
from dipgo_core.zoo.features import FEATURE_DIM, TinyFeatures

Features = npt.NDArray[np.float32]

#: What torch-fidelity knows our Inception by.
SAFE_INCEPTION = "dipgo-inception-v3-compat"
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


class InceptionExtractor(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """torch-fidelity's Inception with weights read from safetensors; no file is unpickled.

    The library's class loads whatever archive it is given: here one in memory, made of the tensors.
    """

    def __init__(
        self,
        name: str,
        features_list: list[str],
        feature_extractor_weights_path: str = INCEPTION,
        **settings: object,
    ) -> None:
        archive = io.BytesIO()
        torch.save(inception_state(feature_extractor_weights_path), archive)
        archive.seek(0)
        super().__init__(name, features_list, feature_extractor_weights_path=archive, **settings)


register_feature_extractor(TINY_FEATURES, TinyFeaturesExtractor)
register_feature_extractor(SAFE_INCEPTION, InceptionExtractor)


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
            module = InceptionExtractor(SAFE_INCEPTION, ["2048"], name)
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
    parts = [extractor(batch) for batch in read_images(image_files(folder))]
    features = np.concatenate(parts)
    return reference_of(features, extractor.scorer, id=folder_id(folder), paired=False)


def fid_figures(
    features: Features, reference: Reference, groups: npt.ArrayLike
) -> dict[str, Figure]:
    """Return torch-fidelity's FID as `fid` and, where n allows, `fid_infinity`.

    `fid` has an interval only where n >= 4 x feature dimension. It bounds the distance of the two
    distributions, that is FID without its bias from n images (by the block jackknife), and is
    widened to contain the FID shown, which lies at its upper end where the bias is larger than the
    spread. `fid_infinity` is there from n >= 8 x feature dimension on: FID extrapolated to
    infinitely many images, with the same bounds without that widening.

    groups: (n,) prompt of each image.
    """
    check_reference(features, reference)
    value, n, scorer = _fid(features, reference), len(features), reference.scorer.id
    moments_of_reference = (reference.mean, reference.covariance)
    paired = reference.features if reference.paired else None
    theirs = moments_of_reference if paired is None else paired
    interval = fid_jackknife(features, theirs, groups, paired=paired is not None)
    if interval is None:
        return {"fid": Figure(value, None, None, n, scorer)}
    low, high = interval.low, interval.high
    figures = {"fid": Figure(value, min(low, value), max(high, value), n, scorer)}
    infinity = fid_infinity(features, theirs, groups, paired=paired is not None)
    if infinity is not None:
        ends = min(low, infinity), max(high, infinity)
        figures["fid_infinity"] = Figure(infinity, *ends, n, scorer)
    return figures


def kid_figure(
    features: Features, reference: Reference, groups: npt.ArrayLike, *, subset_size: int
) -> Figure:
    """Return torch-fidelity's KID (mean over 100 subsets) with its interval by prompt.

    The interval bounds the distance of the two distributions, that is KID without what images of
    one prompt, or an image and its dense image, add to it. It is widened to contain the KID shown.

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
    value, n, scorer = result[KEY_METRIC_KID_MEAN], len(features), reference.scorer.id
    interval = mmd_interval(
        value,
        features,
        known,
        groups,
        kernel=polynomial_kernel,
        paired=reference.paired,
        value_error=result[KEY_METRIC_KID_STD] / math.sqrt(KID_SUBSETS),
    )
    if interval is None:
        return Figure(value, None, None, n, scorer)
    return Figure(value, min(interval.low, value), max(interval.high, value), n, scorer)


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
    theirs = reference.mean if reference.features is None else reference.features.mean(axis=0)
    ours = features.mean(axis=0)  # in float32, as torch-fidelity takes it
    distance = fid_statistics_to_metric(
        {"mu": ours, "sigma": moments(features)[1]},
        {"mu": theirs.astype(ours.dtype), "sigma": reference.covariance},
        verbose=False,
    )
    return float(distance[KEY_METRIC_FID])


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


def read_images(files: Iterable[Path]) -> Iterable[Tensor]:
    """Yield images as torch-fidelity reads them, one a batch: sizes may differ, extractors resize.

    Raises:
        EvaluationError: a file that cannot be read.
    """
    for path in files:
        yield torch.from_numpy(read_image(path)).permute(2, 0, 1)[None]
