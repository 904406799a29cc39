"""FID without its bias: moments, the block jackknife, FID infinity. numpy only.

FID of n images is too large by about c / n, c depending on the images: resampling them cannot see
that, so a bootstrap of FID or an uncorrected jackknife bounds the wrong number. Features stay in
float32 and moments are summed chunk by chunk in float64: 30,000 x 2,048 features take no second
copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import (
    Floats,
    Groups,
    Interval,
    Replicates,
    bunch_groups,
    group_codes,
    interval_of,
)

Array = npt.NDArray[Any]
Moments = tuple[Floats, Floats]  # mean (d,), covariance (d, d)

FID_BLOCKS = 32
#: FID is bounded or extrapolated only from sets of at least so many images a feature: below, its
#: bias is no longer proportional to 1 / n.
IMAGES_PER_FEATURE = 4
#: Largest number of parts that FID infinity is extrapolated from.
MAX_PARTS = 4

_ROWS = 1024


def moments(features: Array) -> Moments:
    """Return mean and unbiased covariance of rows, in float64.  # (n, d)"""
    return _moments_of(features, np.arange(len(features)))


def frechet_distance(
    mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats
) -> float:
    """Return the Frechet distance of two Gaussians (FID's formula).

    The trace of the square root comes from a symmetric eigenproblem, several times faster than
    the general one and without complex numbers.
    """
    return _frechet((mean_a, covariance_a), (mean_b, covariance_b), _factor(covariance_b))


def fid_jackknife(
    features: Array,
    reference: Array | Moments,
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    blocks: int = FID_BLOCKS,
    seed: int = 0,
) -> Interval | None:
    """Return the bias-corrected FID with its interval, or None where none can be trusted.

    Jackknife over `blocks` random blocks of prompts: B f - (B - 1) mean(f without block k).
    None where n < 4 x feature dimension (its coverage is then below 85 %) or prompts < blocks.

    features: (n, d); reference: (m, d), or its mean and covariance. `paired`: reference[i] is the
    dense image of features[i] and leaves with its block; otherwise it is held fixed.
    """
    left_out = fid_replicates(features, reference, groups, paired=paired, blocks=blocks, seed=seed)
    if left_out is None:
        return None
    found = interval_of(left_out)
    return Interval(found.value, max(0.0, found.low), max(0.0, found.high))


def fid_replicates(
    features: Array,
    reference: Array | Moments,
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    blocks: int = FID_BLOCKS,
    seed: int = 0,
) -> Replicates | None:
    """Return FID of all images, then without each block of prompts in turn.

    Arguments and None as of `fid_jackknife`.
    """
    x = np.asarray(features)
    codes, count = group_codes(groups, len(x))
    if len(x) < IMAGES_PER_FEATURE * x.shape[1] or count < blocks:
        return None
    codes, _ = bunch_groups(codes, count, blocks, seed)
    ours = _block_moments(x, codes, blocks)
    if paired:
        theirs = _block_moments(_rows(reference, x), codes, blocks)
        values = [frechet_distance(*a, *b) for a, b in zip(ours, theirs, strict=True)]
    else:
        fixed = _fixed(reference)
        factor = _factor(fixed[1])
        values = [_frechet(part, fixed, factor) for part in ours]
    return Replicates(np.array(values), blocks, len(x), "jackknife")


def fid_infinity(
    features: Array,
    reference: Array | Moments,
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    seed: int = 0,
) -> float | None:
    """Return FID extrapolated to infinitely many images, or None where there are too few.

    A straight line through FID against 1 / n (Chong and Forsyth 2020, arXiv 1911.07023), of all
    images, of both halves, and so on to quarters, as long as a part holds 4 x feature dimension.
    Differs from the paper: parts are disjoint, of whole prompts, and each number of parts is
    averaged, so that every size uses all images once.

    Arguments as of `fid_jackknife`.
    """
    x = np.asarray(features)
    codes, count = group_codes(groups, len(x))
    most = min(MAX_PARTS, len(x) // (IMAGES_PER_FEATURE * x.shape[1]), count)
    if most < 2:
        return None
    theirs = _rows(reference, x) if paired else _fixed(reference)
    factor = None if isinstance(theirs, np.ndarray) else _factor(theirs[1])
    sizes, values = [], []
    for parts in range(1, most + 1):
        bunch, _ = bunch_groups(codes, count, parts, seed)
        indices = [np.flatnonzero(bunch == part) for part in range(parts)]
        sizes.append(np.mean([1 / len(rows) for rows in indices]))
        values.append(np.mean([_part_fid(x, theirs, factor, rows) for rows in indices]))
    return max(0.0, float(np.polyfit(sizes, values, 1)[1]))


def _part_fid(x: Array, reference: Array | Moments, factor: Floats | None, rows: Groups) -> float:
    ours = _moments_of(x, rows)
    if factor is None or isinstance(reference, np.ndarray):
        return frechet_distance(*ours, *_moments_of(np.asarray(reference), rows))
    return _frechet(ours, reference, factor)


def _rows(reference: Array | Moments, features: Array) -> Array:
    if isinstance(reference, tuple) or reference.shape != features.shape:
        shape = "moments" if isinstance(reference, tuple) else reference.shape
        raise EvaluationError(f"paired features need one shape, got {features.shape} and {shape}")
    return reference


def _fixed(reference: Array | Moments) -> Moments:
    return reference if isinstance(reference, tuple) else moments(reference)


def _factor(covariance: Floats) -> Floats:
    """Return f with f f' = covariance, by Cholesky with pivots: features may be degenerate."""
    lower, pivots, rank, info = lapack.dpstrf(covariance, lower=1)
    if info < 0:
        raise EvaluationError("a covariance has no Cholesky factor: features are not finite")
    factor = np.zeros((len(covariance), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor


def _frechet(a: Moments, b: Moments, factor_b: Floats) -> float:
    product = factor_b.T @ a[1] @ factor_b
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None))
    difference = a[0] - b[0]
    traces = np.trace(a[1]) + np.trace(b[1])
    return float(difference @ difference + traces - 2 * roots.sum())


def _moments_of(x: Array, rows: Groups) -> Moments:
    centre = _sum(x, rows, 0.0) / len(rows)
    shift = _sum(x, rows, centre) / len(rows)  # what rounding left
    scatter = _scatter(x, rows, centre) - len(rows) * np.outer(shift, shift)
    return centre + shift, scatter / (len(rows) - 1)


def _block_moments(x: Array, codes: Groups, blocks: int) -> Iterator[Moments]:
    """Moments of all rows, then without each block; one covariance at a time.

    From sums of rows around the mean of all, so that nothing is lost to cancellation.
    """
    order = np.argsort(codes, kind="stable")
    members = np.split(order, np.searchsorted(codes[order], np.arange(1, blocks)))
    centre = _sum(x, order, 0.0) / len(x)
    total = _scatter(x, order, centre)
    yield centre, total / (len(x) - 1)
    for rows in members:
        n = len(x) - len(rows)
        shift = -_sum(x, rows, centre) / n  # mean of the others, as seen from the centre
        scatter = total - _scatter(x, rows, centre) - n * np.outer(shift, shift)
        yield centre + shift, scatter / (n - 1)


def _chunks(x: Array, rows: Groups) -> Iterator[Floats]:
    for start in range(0, len(rows), _ROWS):
        yield x[rows[start : start + _ROWS]].astype(np.float64)


def _sum(x: Array, rows: Groups, centre: Floats | float) -> Floats:
    total = np.zeros(x.shape[1])
    for chunk in _chunks(x, rows):
        total += (chunk - centre).sum(axis=0)
    return total


def _scatter(x: Array, rows: Groups, centre: Floats) -> Floats:
    total = np.zeros((x.shape[1], x.shape[1]))
    for chunk in _chunks(x, rows):
        chunk -= centre
        total += chunk.T @ chunk
    return total
