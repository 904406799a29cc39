"""Intervals of figures: bootstrap by prompt, KID's by a kernel matrix, FID's by a jackknife.

numpy only. Images of one prompt are not independent, so every interval resamples prompts
("groups"), never images. All draws are seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from dipgo_core.errors import EvaluationError

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
#: Similarity of every row of one array with every row of another.  # (n, d), (m, d) -> (n, m)
Kernel = Callable[[Floats, Floats], Floats]

RESAMPLES = 1000
FID_BLOCKS = 32
#: More prompts than this are resampled in random bunches, which keeps KID's matrix small.
MAX_GROUPS = 2000


@dataclass(frozen=True)
class Figure:
    """One measured figure; `low` and `high` bound it with 95 % confidence, None = no interval.

    scorer: id of the network behind it, None where there is none. protocol: hash of the protocol it
    was measured under.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    scorer: str | None = None
    protocol: str | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise EvaluationError(f"a figure of {self.n} images came out as {self.value}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Figure:
        return cls(**data)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % bounds."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Replicates:
    """A figure of all images (values[0]) and of each resample, or without each block in turn.

    Every figure of the same prompts, seed and number of resamples was resampled with the same
    draws, whatever the metric: such replicates may be subtracted (`difference_of`), averaged, or
    looked at jointly, row by row.

    values: (1 + R,), in the figure's own unit, up to a constant that differences lose.
    groups: how many prompts (or bunches of them) were drawn from. n: images.
    method: "bootstrap" of prompts, or "jackknife": one block of prompts left out at a time.
    """

    values: Floats
    groups: int
    n: int
    method: Literal["bootstrap", "jackknife"] = "bootstrap"


def mean_replicates_of(
    values: npt.ArrayLike, groups: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Replicates | None:
    """Return the mean of `values`, of all images and of each resample; None for one prompt only.

    values, groups: (n,), score and prompt of each image.
    """
    scores = np.asarray(values, dtype=np.float64)
    drawn = _draw(groups, len(scores), resamples, seed)
    if drawn is None:
        return None
    whole = scores.mean()
    sums = np.bincount(drawn.codes, weights=scores - whole, minlength=drawn.count)
    deviations = (drawn.weights @ sums) / (drawn.weights @ drawn.sizes)
    return Replicates(np.append(whole, whole + deviations), drawn.count, len(scores))


def difference_of(a: Replicates, b: Replicates) -> Replicates:
    """Return the replicates of a - b.

    Raises:
        EvaluationError: the two sides were not resampled alike: other numbers of images, prompts
            or resamples. (That the prompts and seeds are the same, the caller knows.)
    """
    mine, theirs = _how(a), _how(b)
    if mine != theirs:
        raise EvaluationError(
            f"only figures of the same images can be subtracted, got {mine} and {theirs}: compare "
            "at equal n and equal seeds"
        )
    return Replicates(a.values - b.values, a.groups, a.n, a.method)


def average_of(several: Sequence[Replicates]) -> Replicates:
    """Return the replicates of the mean figure, such as that of several random draws."""
    first = several[0]
    values = np.mean([one.values for one in several], axis=0)
    return Replicates(values, first.groups, first.n, first.method)


def interval_of(replicates: Replicates) -> Interval:
    """Return the estimate with its 95 % interval.

    Bootstrap: percentiles of the deviations from their mean, moved outwards by what a t quantile of
    as many groups would ask (Hesterberg 2015, section 4.3). Jackknife: the bias-corrected estimate
    B f - (B - 1) mean(f without block k), with the t quantile of B - 1 degrees of freedom.
    """
    whole, drawn = float(replicates.values[0]), replicates.values[1:]
    if replicates.method == "bootstrap":
        return _around(whole, drawn - drawn.mean(), replicates.groups)
    blocks = replicates.groups
    corrected = blocks * whole - (blocks - 1) * float(drawn.mean())
    spread = math.sqrt((blocks - 1) / blocks * float(((drawn - drawn.mean()) ** 2).sum()))
    reach = float(stdtrit(blocks - 1, 0.975)) * spread
    return Interval(corrected, corrected - reach, corrected + reach)


def bootstrap_mean(
    values: npt.ArrayLike, groups: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Return the mean of `values` with its interval, or None for the bounds of fewer than 2 groups.

    values, groups: (n,).
    """
    known = mean_replicates_of(values, groups, resamples=resamples, seed=seed)
    return None if known is None else interval_of(known)


def bootstrap_difference(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Return mean(a - b) of images paired by index, with its interval.  # a, b, groups: (n,)

    Raises:
        EvaluationError: a and b are not of one length.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape:
        raise EvaluationError(
            f"a paired difference needs the same images, got {len(a)} and {len(b)}"
        )
    return bootstrap_mean(a - b, groups, resamples=resamples, seed=seed)


def bootstrap_median(
    values: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the median of independent values with its percentile-bootstrap interval.  # (n,)"""
    values = np.asarray(values, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    medians = np.median(values[drawn], axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    value = float(np.median(values))
    return Interval(value, min(value, float(low)), max(value, float(high)))


def kid_interval(
    value: float,
    features: npt.ArrayLike,
    reference: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Return KID's `value` with its interval, or None for fewer than 2 groups.

    features: (n, d); reference: (m, d), held fixed, unless `paired`: then reference[i] is the
    dense image of features[i] and is resampled with it. Pairs of one image with itself are left
    out, so that drawing a prompt twice adds no similarity; what bias remains is subtracted.
    """
    drawn = kid_replicates(
        features, reference, groups, paired=paired, resamples=resamples, seed=seed
    )
    if drawn is None:
        return None
    return _around(value, drawn.values[1:] - drawn.values[1:].mean(), drawn.groups)


def kid_replicates(
    features: npt.ArrayLike,
    reference: npt.ArrayLike,
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Replicates | None:
    """Return KID, up to a constant of the reference, of all images and of each resample.

    Arguments as of `kid_interval`; None for fewer than 2 groups.
    """
    return mmd_replicates(
        features,
        reference,
        groups,
        kernel=_polynomial,
        paired=paired,
        resamples=resamples,
        seed=seed,
    )


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
    """Return the unbiased squared MMD of any kernel (Gretton et al. 2012, equation 3), up to the
    reference's own mean similarity unless `paired`; other arguments as of `kid_interval`.
    """
    x = np.asarray(features, dtype=np.float64)
    y = np.asarray(reference, dtype=np.float64)
    drawn = _draw(groups, len(x), resamples, seed)
    if drawn is None:
        return None
    weights = np.concatenate([np.ones((1, drawn.count)), drawn.weights])
    values = _mmd_resamples(x, y, drawn.codes, drawn.count, paired, weights, kernel)
    return Replicates(values, drawn.count, len(x))


def kid_difference(a: Replicates, b: Replicates) -> Interval:
    """Return KID(a) - KID(b) with its interval; both sides drew the same prompts."""
    return interval_of(difference_of(a, b))


def frechet_distance(
    mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats
) -> float:
    """Return the Frechet distance of two Gaussians (FID's formula).

    The trace of the square root comes from a symmetric eigenproblem, several times faster than
    the general one and without complex numbers.
    """
    return _frechet(mean_a, covariance_a, mean_b, covariance_b, _square_root(covariance_b))


def fid_jackknife(
    features: npt.ArrayLike,
    reference: npt.ArrayLike | tuple[Floats, Floats],
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
    return Interval(found.value, max(0.0, found.low), found.high)


def fid_replicates(
    features: npt.ArrayLike,
    reference: npt.ArrayLike | tuple[Floats, Floats],
    groups: npt.ArrayLike,
    *,
    paired: bool = False,
    blocks: int = FID_BLOCKS,
    seed: int = 0,
) -> Replicates | None:
    """Return FID of all images, then without each block of prompts in turn.

    Arguments and None as of `fid_jackknife`.
    """
    x = np.asarray(features, dtype=np.float64)
    codes, count = _codes(groups, len(x))
    if len(x) < 4 * x.shape[1] or count < blocks:
        return None
    codes, _ = _bunches(codes, count, blocks, seed)
    values = _leave_one_out(x, reference, codes, blocks, paired)
    return Replicates(values, blocks, len(x), "jackknife")


def fid_difference(a: Replicates, b: Replicates) -> Interval:
    """Return the bias-corrected FID(a) - FID(b); both sides lost the same blocks of prompts."""
    return interval_of(difference_of(a, b))


def mean_replicates(several: Sequence[Replicates]) -> Replicates:
    """Return the replicates of the mean figure, such as that of several random draws."""
    return average_of(several)


@dataclass(frozen=True, eq=False)
class _Draws:
    """Which prompts each resample holds: codes (n,), sizes (G,), weights (R, G) = times drawn."""

    codes: Groups
    count: int
    sizes: Floats
    weights: Floats


def _draw(groups: npt.ArrayLike, n: int, resamples: int, seed: int) -> _Draws | None:
    """Draw prompts, in bunches where there are very many; None for fewer than 2 prompts."""
    codes, count = _codes(groups, n)
    if count < 2:
        return None
    if count > MAX_GROUPS:
        codes, count = _bunches(codes, count, MAX_GROUPS, seed)
    sizes = np.bincount(codes, minlength=count).astype(np.float64)
    return _Draws(codes, count, sizes, _weights(count, resamples, seed))


def _how(replicates: Replicates) -> str:
    return (
        f"{replicates.method} of {replicates.n} images in {replicates.groups} groups, "
        f"{len(replicates.values) - 1} times"
    )


def _codes(groups: npt.ArrayLike, length: int) -> tuple[Groups, int]:
    groups = np.asarray(groups)
    if groups.shape != (length,):
        raise EvaluationError(
            f"each image needs its prompt: {length} images, groups of shape {groups.shape}"
        )
    distinct, codes = np.unique(groups, return_inverse=True)
    return codes.astype(np.int64), len(distinct)


def _bunches(codes: Groups, count: int, bunches: int, seed: int) -> tuple[Groups, int]:
    """Put whole groups into equally many, randomly chosen bunches."""
    order = np.random.default_rng(seed).permutation(count)
    return (order % bunches)[codes], bunches


def _weights(count: int, resamples: int, seed: int) -> Floats:
    """How often each group is drawn in each resample.  # (R, G)"""
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    drawn += np.arange(resamples)[:, None] * count
    counts = np.bincount(drawn.ravel(), minlength=resamples * count)
    return counts.reshape(resamples, count).astype(np.float64)


def _around(value: float, deviations: Floats, count: int) -> Interval:
    """Bounds at the expanded percentiles of the deviations; they always contain the value."""
    tail = float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.025)))
    low, high = np.quantile(deviations, [tail, 1 - tail])
    return Interval(value, value + min(0.0, float(low)), value + max(0.0, float(high)))


def _mmd_resamples(
    x: Floats,
    y: Floats,
    codes: Groups,
    count: int,
    paired: bool,
    weights: Floats,
    kernel: Kernel,
) -> Floats:
    """Squared MMD of each resample, up to a constant.  # weights (R, G) -> (R,)"""
    if paired and x.shape != y.shape:
        raise EvaluationError(f"paired features need one shape, got {x.shape} and {y.shape}")
    sizes = np.bincount(codes, minlength=count).astype(np.float64)
    drawn = weights @ sizes  # (R,) images of each resample
    pairs = drawn**2 - weights**2 @ sizes  # an image is no pair with itself
    within = _kernel_sums(x, x, codes, count, kernel, distinct=True)  # (G, G)
    if not paired:
        across = np.bincount(codes, weights=_kernel_means(x, y, kernel), minlength=count)  # (G,)
        return _quadratic(weights, within) / pairs - 2 * (weights @ across) / drawn
    within += _kernel_sums(y, y, codes, count, kernel, distinct=True)
    between = _kernel_sums(x, y, codes, count, kernel, distinct=False)
    return _quadratic(weights, within) / pairs - 2 * _quadratic(weights, between) / drawn**2


def _quadratic(weights: Floats, matrix: Floats) -> Floats:
    result: Floats = np.einsum("rg,rg->r", weights @ matrix, weights)
    return result


def _polynomial(x: Floats, y: Floats) -> Floats:
    """KID's polynomial kernel (Binkowski et al. 2018).  # (n, m)"""
    base: Floats = x @ y.T / x.shape[1] + 1.0
    return base * base * base  # several times faster than a power


def _kernel_means(x: Floats, y: Floats, kernel: Kernel, rows: int = 512) -> Floats:
    """Mean kernel of each x with all y.  # (n,)"""
    parts = [kernel(x[i : i + rows], y).mean(axis=1) for i in range(0, len(x), rows)]
    return np.concatenate(parts)


def _kernel_sums(
    x: Floats,
    y: Floats,
    codes: Groups,
    count: int,
    kernel: Kernel,
    *,
    distinct: bool,
    rows: int = 512,
) -> Floats:
    """Sum of the kernel over all pairs of two groups, a chunk of rows at a time.  # (G, G)

    codes: the group of row i of x and of y. distinct: leave out pairs (i, i).
    """
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(count))
    sums = np.zeros((count, count))
    for start in range(0, len(x), rows):
        values = kernel(x[start : start + rows], y)
        if distinct:
            span = np.arange(len(values))
            values[span, start + span] = 0.0
        np.add.at(
            sums,
            codes[start : start + rows],
            np.add.reduceat(values[:, order], starts, axis=1),
        )
    return sums


def _square_root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh(covariance)
    result: Floats = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return result


def _frechet(
    mean_a: Floats, covariance_a: Floats, mean_b: Floats, covariance_b: Floats, root_b: Floats
) -> float:
    product = root_b @ covariance_a @ root_b
    roots = np.sqrt(np.clip(np.linalg.eigvalsh((product + product.T) / 2), 0, None))
    difference = mean_a - mean_b
    traces = np.trace(covariance_a) + np.trace(covariance_b)
    return float(difference @ difference + traces - 2 * roots.sum())


def _leave_one_out(
    x: Floats,
    reference: npt.ArrayLike | tuple[Floats, Floats],
    codes: Groups,
    blocks: int,
    paired: bool,
) -> Floats:
    """FID of all images, then without each block in turn.  # (1 + blocks,)"""
    ours = _block_statistics(x, codes, blocks)
    if paired:
        theirs = _block_statistics(np.asarray(reference, dtype=np.float64), codes, blocks)
        return np.array([frechet_distance(*a, *b) for a, b in zip(ours, theirs, strict=True)])
    mean, covariance = _statistics_of(reference)
    root = _square_root(covariance)
    return np.array([_frechet(*part, mean, covariance, root) for part in ours])


def _statistics_of(reference: npt.ArrayLike | tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    if isinstance(reference, tuple):
        return reference[0].astype(np.float64), reference[1].astype(np.float64)
    features = np.asarray(reference, dtype=np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def _block_statistics(x: Floats, codes: Groups, blocks: int) -> list[tuple[Floats, Floats]]:
    """Mean and covariance of all rows, then without each block, from sums of centred rows."""
    centre = x.mean(axis=0)
    centred = x - centre
    total = centred.T @ centred
    statistics = [(centre, total / (len(x) - 1))]
    for block in range(blocks):
        part = centred[codes == block]
        n = len(x) - len(part)
        shift = -part.sum(axis=0) / n  # mean of the others, as seen from the centre
        scatter = total - part.T @ part - n * np.outer(shift, shift)
        statistics.append((centre + shift, scatter / (n - 1)))
    return statistics
