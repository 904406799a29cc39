"""CMMD of two sets of embeddings, with its interval (Jayasumana et al. 2024). numpy only.

The estimator is the paper's unbiased one, in which no image is compared with itself: small sets do
not read worse, and equal sets may read slightly below 0. The authors' released code compares them
(the biased estimator), which adds about 2000 / n times (1 - mean kernel) at n images.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import RESAMPLES, Figure, Replicates
from dipgo_core.evaluation.mmd_intervals import mmd_interval, mmd_replicates
from dipgo_core.evaluation.reference import Reference

SIGMA: Final = 10.0
SCALE: Final = 1000.0
_ROWS = 1024  # embeddings compared at once: 8 MB of kernel
Array = npt.NDArray[Any]


def cmmd(x: npt.ArrayLike, y: npt.ArrayLike) -> float:
    """Return 1000 times the unbiased squared MMD of two sets of embeddings.  # (n, d), (m, d)

    Raises:
        EvaluationError: fewer than two of a set.
    """
    ours, theirs = np.asarray(x, dtype=np.float32), np.asarray(y, dtype=np.float32)
    if min(len(ours), len(theirs)) < 2:
        raise EvaluationError(f"CMMD needs 2 images or more, got {len(ours)} and {len(theirs)}")
    return SCALE * (_within(ours) + _within(theirs) - 2 * _across(ours, theirs))


def cmmd_figure(
    embeddings: npt.NDArray[np.float32], reference: Reference, groups: npt.ArrayLike
) -> Figure:
    """Return CMMD with its interval by prompt.  # (n, d)

    Raises:
        EvaluationError: a reference without features, of another dimension, or unpaired rows.
    """
    known = _features_of(embeddings, reference)
    value, n, scorer = cmmd(embeddings, known), len(embeddings), reference.scorer.id
    found = mmd_interval(
        value / SCALE, embeddings, known, groups, kernel=gaussian, paired=reference.paired
    )
    if found is None:
        return Figure(value, None, None, n, scorer)
    low, high = min(SCALE * found.low, value), max(SCALE * found.high, value)
    return Figure(value, low, high, n, scorer)


def cmmd_replicates(
    embeddings: npt.ArrayLike,
    reference: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Replicates | None:
    """Return CMMD, up to a constant of the reference, of all images and of each resample.

    Arguments as of `mmd_intervals.mmd_replicates`; None for fewer than 8 prompts.
    """
    found = mmd_replicates(
        embeddings,
        reference,
        groups,
        kernel=gaussian,
        paired=paired,
        resamples=resamples,
        seed=seed,
    )
    if found is None:
        return None
    return Replicates(SCALE * found.values, found.groups, found.n, found.method)


def gaussian(x: Array, y: Array) -> Array:
    """Return exp(-|x - y|^2 / 2 sigma^2) - 1 of every pair.  # (n, d), (m, d) -> (n, m)

    The one that is taken away cancels in an MMD, whose terms all lie close to it. Products are
    taken in the type of the embeddings: in float32, that moves a CMMD by less than 1e-5.
    """
    distances = _squares(x)[:, None] + _squares(y) - 2 * (x @ y.T).astype(np.float64)
    distances /= -2 * SIGMA**2
    return np.expm1(np.minimum(distances, 0.0, out=distances), out=distances)


def _squares(x: Array) -> Array:
    squares: Array = np.square(x, dtype=np.float64).sum(axis=1)
    return squares


def _features_of(
    embeddings: npt.NDArray[np.float32], reference: Reference
) -> npt.NDArray[np.float32]:
    known = reference.features
    if known is None:
        raise EvaluationError(
            "CMMD needs the embeddings of the reference images, these statistics hold only "
            "moments: use reference: dense or a folder"
        )
    if embeddings.ndim != 2 or embeddings.shape[1:] != known.shape[1:]:
        raise EvaluationError(
            f"embeddings of shape {embeddings.shape} do not fit a reference of {known.shape} made "
            f"with {reference.scorer.id}"
        )
    if reference.paired and len(embeddings) != len(known):
        raise EvaluationError(
            f"the dense reference has {len(known)} images, there are {len(embeddings)}: both must "
            "come from the same seeds"
        )
    return known


def _within(x: npt.NDArray[np.float32]) -> float:
    """Mean kernel of an image with another; with itself it is 0."""
    starts = range(0, len(x), _ROWS)
    total = 0.0
    for i in starts:
        kernel = gaussian(x[i : i + _ROWS], x[i : i + _ROWS])
        total += float(kernel.sum() - np.trace(kernel))
        total += 2 * sum(_block_sum(x, x, i, j) for j in starts if j > i)
    return total / (len(x) * (len(x) - 1))


def _across(x: npt.NDArray[np.float32], y: npt.NDArray[np.float32]) -> float:
    """Mean kernel of an image with one of the others."""
    blocks = ((i, j) for i in range(0, len(x), _ROWS) for j in range(0, len(y), _ROWS))
    return sum(_block_sum(x, y, i, j) for i, j in blocks) / (len(x) * len(y))


def _block_sum(x: Array, y: Array, i: int, j: int) -> float:
    return float(gaussian(x[i : i + _ROWS], y[j : j + _ROWS]).sum())
