"""Figures, and their intervals from replicates: bootstrap by prompt, or a block jackknife.

numpy only. Images of one prompt are not independent, so every interval resamples prompts
("groups"), never images. All draws are seeded. Replicates of means are made here, those of KID
and its like in `mmd_intervals`, those of FID in `fid_intervals`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from dipgo_core.errors import EvaluationError

Floats = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]

RESAMPLES = 1000
#: More prompts than this are resampled in random bunches, which keeps
#: KID's matrix and the draws small.
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
    drawn = draw_groups(groups, len(scores), resamples, seed)
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


def unpaired_gap(a: Interval, b: Interval) -> Interval:
    """Return a - b from two separate intervals, by the MOVER of Zou and Donner.

    Statistics in Medicine 27 (2008), 1693-1702, equation for theta1 - theta2. Exact intervals of
    independent figures give one of the same confidence; where the figures share prompts and noise
    it is wider than it need be.
    """
    value = a.value - b.value
    return Interval(
        value,
        value - math.hypot(a.value - a.low, b.high - b.value),
        value + math.hypot(a.high - a.value, b.value - b.low),
    )


def unpaired_ratio(a: Interval, b: Interval) -> Interval:
    """Return the logarithm of a / b from two separate intervals of positive figures."""
    return unpaired_gap(_logarithm(a), _logarithm(b))


def bootstrap_mean(
    values: npt.ArrayLike, groups: npt.ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval | None:
    """Return the mean of `values` with its interval, or None for the bounds of fewer than 2 groups.

    values, groups: (n,).
    """
    known = mean_replicates_of(values, groups, resamples=resamples, seed=seed)
    return None if known is None else interval_of(known)


#: Of fewer values no interval of a median is told: at 2 it holds half of what it claims to.
LEAST_FOR_MEDIAN = 6


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


@dataclass(frozen=True, eq=False)
class Draws:
    """Which prompts each resample holds: codes (n,), sizes (G,), weights (R, G) = times drawn."""

    codes: Groups
    count: int
    sizes: Floats
    weights: Floats


def draw_groups(groups: npt.ArrayLike, n: int, resamples: int, seed: int) -> Draws | None:
    """Draw prompts, in bunches where there are very many; None for fewer than 2 prompts."""
    codes, count = group_codes(groups, n)
    if count < 2:
        return None
    if count > MAX_GROUPS:
        codes, count = bunch_groups(codes, count, MAX_GROUPS, seed)
    sizes = np.bincount(codes, minlength=count).astype(np.float64)
    return Draws(codes, count, sizes, _weights(count, resamples, seed))


def _how(replicates: Replicates) -> str:
    return (
        f"{replicates.method} of {replicates.n} images in {replicates.groups} groups, "
        f"{len(replicates.values) - 1} times"
    )


def group_codes(groups: npt.ArrayLike, length: int) -> tuple[Groups, int]:
    groups = np.asarray(groups)
    if groups.shape != (length,):
        raise EvaluationError(
            f"each image needs its prompt: {length} images, groups of shape {groups.shape}"
        )
    distinct, codes = np.unique(groups, return_inverse=True)
    return codes.astype(np.int64), len(distinct)


def bunch_groups(codes: Groups, count: int, bunches: int, seed: int) -> tuple[Groups, int]:
    """Put whole groups into equally many, randomly chosen bunches."""
    order = np.random.default_rng(seed).permutation(count)
    return (order % bunches)[codes], bunches


def _weights(count: int, resamples: int, seed: int) -> Floats:
    """How often each group is drawn in each resample.  # (R, G)"""
    drawn = np.random.default_rng(seed).integers(0, count, (resamples, count))
    drawn += np.arange(resamples)[:, None] * count
    counts = np.bincount(drawn.ravel(), minlength=resamples * count)
    return counts.reshape(resamples, count).astype(np.float64)


def _logarithm(known: Interval) -> Interval:
    return Interval(math.log(known.value), math.log(known.low), math.log(known.high))


def _around(value: float, deviations: Floats, count: int) -> Interval:
    """Bounds at the expanded percentiles of the deviations; they always contain the value."""
    tail = float(ndtr(math.sqrt(count / (count - 1)) * stdtrit(count - 1, 0.025)))
    low, high = np.quantile(deviations, [tail, 1 - tail])
    return Interval(value, value + min(0.0, float(low)), value + max(0.0, float(high)))
