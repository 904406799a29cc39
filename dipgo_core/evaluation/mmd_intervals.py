"""Squared MMD (KID and its like): replicates and intervals by prompt. numpy only.

Textbook estimates (Gretton et al. 2012, equation 3; Binkowski et al. 2018 for KID) take all images
for independent. Images of one prompt are not, nor is an image of the dense one of the same noise.
So whatever bounds a figure here uses only pairs of images of *different* prompts, which are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import (
    RESAMPLES,
    Draws,
    Floats,
    Groups,
    Interval,
    Replicates,
    draw_groups,
    interval_of,
)
from dipgo_core.evaluation.metrics import MIN_PROMPTS

Array = npt.NDArray[Any]
#: Similarity of every row of one array with every row of another.  # (n, d), (m, d) -> (n, m)
Kernel = Callable[[Array, Array], Array]

_ROWS = 256  # of the kernel matrix held at once


def polynomial_kernel(x: Array, y: Array) -> Array:
    """Return KID's kernel (x y / d + 1)^3 (Binkowski et al. 2018).  # (n, d), (m, d) -> (n, m)"""
    base = x @ y.T
    base /= x.shape[1]
    base += 1.0
    cubed: Array = base * base * base  # several times faster than a power
    return cubed


def mmd_replicates(
    features: npt.ArrayLike,
    reference: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    kernel: Kernel,
    paired: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Replicates | None:
    """Return the squared MMD of all images and of each resample; None for fewer than 8 prompts.

    Up to the similarity of the reference's images among themselves unless `paired`. Differences of
    two figures that are both 0 get an interval about 1.7 times too wide, which makes a tie surer.

    features: (n, d); reference: (m, d), held fixed, unless `paired`: then reference[i] is the
    dense image of features[i] and is resampled with it.
    """
    x, y = np.asarray(features), np.asarray(reference)
    drawn = draw_groups(groups, len(x), resamples, seed)
    if drawn is None or drawn.count < MIN_PROMPTS:
        return None
    similarity = _similarity(x, y, drawn, kernel, paired)
    return Replicates(_resampled(similarity, drawn), drawn.count, len(x))


def kid_replicates(
    features: npt.ArrayLike,
    reference: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Replicates | None:
    """Return the replicates of KID; arguments as of `mmd_replicates`."""
    return mmd_replicates(
        features,
        reference,
        groups,
        kernel=polynomial_kernel,
        paired=paired,
        resamples=resamples,
        seed=seed,
    )


def mmd_interval(
    value: float,
    features: npt.ArrayLike,
    reference: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    kernel: Kernel,
    paired: bool = False,
    value_error: float = 0.0,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Return the squared MMD with its interval, or None for fewer than 8 prompts.

    The estimate is `value` less what pairs of images of one prompt (and of an image with its dense
    image) add to it; the interval bounds the distance of the two distributions.

    value: the textbook (unbiased for independent images) estimate, of all images or as a mean over
    random subsets, whose standard error is then `value_error`. Other arguments as of
    `mmd_replicates`.
    """
    x, y = np.asarray(features), np.asarray(reference)
    drawn = draw_groups(groups, len(x), resamples, seed)
    if drawn is None or drawn.count < MIN_PROMPTS:
        return None
    similarity = _similarity(x, y, drawn, kernel, paired)
    values = _resampled(similarity, drawn)
    values[1:] -= _excess(similarity, drawn)
    values += value - similarity.textbook
    spread = float(values[1:].var())
    if spread > 0:
        middle = values[1:].mean()
        values[1:] = middle + (values[1:] - middle) * np.sqrt(1 + value_error**2 / spread)
    return interval_of(Replicates(values, drawn.count, len(x)))


@dataclass(frozen=True, eq=False)
class _Similarity:
    """Kernel sums of prompts: `between` (G, G) over pairs of images of two different prompts, 0 on
    the diagonal (of both sides, if paired, those across them taken off); `across` (G,): of each
    prompt with the fixed reference. textbook: the estimate of all images as if independent.
    """

    between: Floats
    across: Floats
    textbook: float


def _similarity(x: Array, y: Array, drawn: Draws, kernel: Kernel, paired: bool) -> _Similarity:
    if paired and x.shape != y.shape:
        raise EvaluationError(f"paired features need one shape, got {x.shape} and {y.shape}")
    n, members = len(x), _members(drawn.codes, drawn.count)
    within = _within(x, members, kernel)
    if not paired:
        similar = _kernel_means(x, y, kernel)  # (n,)
        textbook = within.sum() / (n * (n - 1)) - 2 * similar.mean()
        return _Similarity(_off_diagonal(within), members.T @ similar, float(textbook))
    within += _within(y, members, kernel)
    both = _across(x, y, members, kernel)
    textbook = within.sum() / (n * (n - 1)) - 2 * both.sum() / n**2
    return _Similarity(
        _off_diagonal(within - both - both.T), np.zeros(drawn.count), float(textbook)
    )


def _resampled(similarity: _Similarity, drawn: Draws) -> Floats:
    """MMD of all images and of each resample, up to a constant.  # (1 + R,)"""
    weights = np.concatenate([np.ones((1, drawn.count)), drawn.weights])
    images = weights @ drawn.sizes
    pairs = images**2 - weights**2 @ drawn.sizes**2  # of different prompts
    twice = np.einsum("rg,rg->r", weights @ similarity.between, weights)
    whole = np.full_like(twice, twice[0] / pairs[0])  # where one prompt alone was drawn
    mean = np.divide(twice, pairs, out=whole, where=pairs > 0)
    values: Floats = mean - 2 * (weights @ similarity.across) / images
    return values


def _excess(similarity: _Similarity, drawn: Draws) -> Floats:
    """What resampling adds to the spread of the estimate itself, in each resample.  # (R,)

    Each prompt's mean similarity is known only up to the noise of as many others, and resampling
    counts that noise again: three times the variance where the distance is 0 (the statistic is
    degenerate there; Arcones and Gine 1992). The prompts' part is shrunk by the square of the
    share that is noise: by nearly all of it near 0, hardly where noise is the lesser part, so that
    the interval is rather too wide than too narrow in between.
    """
    sizes, count = drawn.sizes, drawn.count
    pairs = sizes.sum() ** 2 - (sizes**2).sum()
    mean = similarity.between.sum() / pairs
    residual = _off_diagonal(similarity.between - mean * np.outer(sizes, sizes))
    by_prompt = residual.sum(axis=1)
    fixed = similarity.across - similarity.across.sum() / sizes.sum() * sizes
    influence = 2 * by_prompt / pairs - 2 * fixed / sizes.sum()  # (G,)
    additive = by_prompt / (count - 2)
    noise = _off_diagonal(residual - additive[:, None] - additive)
    variance = (noise**2).sum() / (count * (count - 3))
    spread = float(influence.var(ddof=1))
    if spread == 0:
        return np.zeros(len(drawn.weights))
    share = 4 * (count - 1) * variance / pairs**2 / spread
    kept = max(0.0, 1 - share**2)
    excess: Floats = (1 - np.sqrt(kept)) * ((drawn.weights - 1) @ influence)
    return excess


def _off_diagonal(matrix: Floats) -> Floats:
    np.fill_diagonal(matrix, 0.0)
    return matrix


def _chunks(length: int) -> Iterator[slice]:
    return (slice(start, min(start + _ROWS, length)) for start in range(0, length, _ROWS))


def _members(codes: Groups, count: int) -> csr_array:
    """One row an image, one column a group: 1 where it belongs.  # (n, G)"""
    ones = np.ones(len(codes))
    return csr_array((ones, codes, np.arange(len(codes) + 1)), shape=(len(codes), count))


def _kernel_means(x: Array, y: Array, kernel: Kernel) -> Floats:
    """Mean kernel of each x with all y.  # (n,)"""
    parts = [kernel(x[rows], y).mean(axis=1, dtype=np.float64) for rows in _chunks(len(x))]
    return np.concatenate(parts)


def _within(x: Array, members: csr_array, kernel: Kernel) -> Floats:
    """Sum of the kernel over all pairs of images (i, j), i != j, of two groups.  # (G, G)

    Each pair is computed once: rows of a chunk with those of it and of later chunks.
    """
    sums = np.zeros((members.shape[1],) * 2)
    for rows in _chunks(len(x)):
        values = kernel(x[rows], x[rows.start :])
        width = len(values)
        values[:, :width] /= 2  # both (i, j) and (j, i) are there
        np.fill_diagonal(values, 0.0)
        sums += members[rows].T @ (values @ members[rows.start :])
    return sums + sums.T


def _across(x: Array, y: Array, members: csr_array, kernel: Kernel) -> Floats:
    """Sum of the kernel over all pairs of an image of x and one of y, of two groups.  # (G, G)"""
    sums = np.zeros((members.shape[1],) * 2)
    for rows in _chunks(len(x)):
        sums += members[rows].T @ (kernel(x[rows], y) @ members)
    return sums
