"""KID's intervals: coverage against closed forms of Gaussians, paired and not, clustered or not."""

from __future__ import annotations

import numpy as np
import pytest
from torch_fidelity.metric_kid import kernel_poly

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import difference_of, interval_of
from dipgo_core.evaluation.mmd_intervals import (
    kid_replicates,
    mmd_interval,
    polynomial_kernel,
)
from tests.support.synthetic import COVERED, DRAWS, SIZES, clustered, groups_of, similar

DIM = 4
REFERENCE = np.random.default_rng(1).normal(size=(400, DIM))
Floats = np.ndarray


def textbook(x: Floats, y: Floats) -> float:
    """Unbiased MMD by torch-fidelity's kernel and the textbook sums."""
    xx, yy, xy = kernel_poly(x, x), kernel_poly(y, y), kernel_poly(x, y)
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


def expected_kernel(a: float, b: float) -> float:
    """E (x y / d + 1)^3 of x ~ N(a, 1), y ~ N(b, 1), by the cumulants of their product."""
    mean, variance, third = a * b, (1 + a * a + b * b) / DIM, 6 * a * b / DIM**2
    return (1 + mean) ** 3 + 3 * (1 + mean) * variance + third


def truth(shift: float, *, paired: bool) -> float:
    """KID of N(shift, 1) and N(0, 1), or the fixed reference."""
    own = expected_kernel(shift, shift)
    if paired:
        return own + expected_kernel(0, 0) - 2 * expected_kernel(shift, 0)
    mean, variance = shift * REFERENCE.mean(1), (REFERENCE**2).sum(1) / DIM**2
    across = ((1 + mean) ** 3 + 3 * (1 + mean) * variance).mean()
    yy = kernel_poly(REFERENCE, REFERENCE)
    return float(own - 2 * across + (yy.sum() - np.trace(yy)) / (400 * 399))


def covered(kind: str, shift: float, *, paired: bool) -> int:
    """How many draws the interval covers the closed form in."""
    sizes, hits = SIZES[kind], 0
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        dense = clustered(rng, sizes, DIM)
        x = similar(rng, dense, sizes, 0.9) + shift
        y = dense if paired else REFERENCE
        interval = mmd_interval(
            textbook(x, y),
            x,
            y,
            groups_of(sizes),
            kernel=polynomial_kernel,
            paired=paired,
            resamples=300,
        )
        hits += interval.low <= truth(shift, paired=paired) <= interval.high
    return hits


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", ["alone", "equal", "unequal"])
def test_kid_interval_covers_the_truth(kind: str, paired: bool) -> None:
    assert covered(kind, 0.5, paired=paired) in COVERED


@pytest.mark.parametrize("kind", ["alone", "unequal"])
def test_kid_interval_covers_a_distance_of_nothing(kind: str) -> None:
    # the statistic is degenerate there; a plain bootstrap covers all 200
    assert covered(kind, 0.0, paired=False) in COVERED


def test_kid_interval_of_paired_images_of_one_distribution_is_wide_rather_than_narrow() -> None:
    assert covered("equal", 0.0, paired=True) >= COVERED.start


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", ["alone", "equal", "unequal"])
def test_kid_difference_covers_the_truth(kind: str, paired: bool) -> None:
    # oracle: the difference of two closed forms; both sides show the same noise
    sizes, hits = SIZES[kind], 0
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        dense = clustered(rng, sizes, DIM)
        a, b = (similar(rng, dense, sizes, 0.9) + shift for shift in (0.1, 0.3))
        y = dense if paired else REFERENCE
        sides = [
            kid_replicates(side, y, groups_of(sizes), paired=paired, resamples=300)
            for side in (a, b)
        ]
        interval = interval_of(difference_of(*sides))
        expected = truth(0.1, paired=paired) - truth(0.3, paired=paired)
        hits += interval.low <= expected <= interval.high

    assert hits in COVERED


def test_difference_interval_is_narrower_than_that_of_one_side() -> None:
    rng, sizes = np.random.default_rng(0), SIZES["alone"]
    a = clustered(rng, sizes, DIM) + 0.3
    b = similar(rng, a - 0.3, sizes, 0.99) + 0.35

    one, other = (kid_replicates(side, REFERENCE, groups_of(sizes)) for side in (a, b))

    both, alone = interval_of(difference_of(one, other)), interval_of(one)
    assert both.high - both.low < 0.5 * (alone.high - alone.low)


@pytest.mark.parametrize("paired", [False, True])
def test_replicates_equal_the_sum_over_pairs_of_different_prompts(paired: bool) -> None:
    # oracle: a plain double loop over all images
    rng, groups = np.random.default_rng(0), np.array([0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 1])
    x, y = rng.normal(size=(11, DIM)), rng.normal(size=(11, DIM))
    pairs = [(i, j) for i in range(11) for j in range(11) if groups[i] != groups[j]]
    within = np.mean([kernel_poly(x[[i]], x[[j]]) for i, j in pairs])
    across = kernel_poly(x, y).mean()
    if paired:
        within += np.mean([kernel_poly(y[[i]], y[[j]]) for i, j in pairs])
        across = np.mean([kernel_poly(x[[i]], y[[j]]) for i, j in pairs])

    found = kid_replicates(x, y, groups, paired=paired, resamples=10)

    assert found.values[0] == pytest.approx(within - 2 * across)


def test_single_precision_features_give_the_same_interval() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(300, 64)) + 0.1, rng.normal(size=(300, 64))
    exact, single = (
        interval_of(kid_replicates(x.astype(kind), y.astype(kind), np.arange(300)))
        for kind in (np.float64, np.float32)
    )

    assert single.low == pytest.approx(exact.low, rel=1e-4)
    assert single.high == pytest.approx(exact.high, rel=1e-4)


def test_noise_of_the_value_widens_the_interval() -> None:
    x = np.random.default_rng(0).normal(size=(100, DIM)) + 0.3
    sure, noisy = (
        mmd_interval(0.0, x, REFERENCE, np.arange(100), kernel=polynomial_kernel, value_error=error)
        for error in (0.0, 1.0)
    )

    assert noisy.value == sure.value
    assert noisy.high - noisy.low == pytest.approx(3.92, rel=0.15)
    assert sure.high - sure.low < 1


def test_many_prompts_are_bunched_and_give_the_same_width(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 4)) + 0.3, rng.normal(size=(500, 4))
    whole = interval_of(kid_replicates(x, y, np.arange(600)))
    monkeypatch.setattr("dipgo_core.evaluation.intervals.MAX_GROUPS", 200)

    bunched = interval_of(kid_replicates(x, y, np.arange(600)))

    assert bunched.high - bunched.low == pytest.approx(whole.high - whole.low, rel=0.25)


def test_seven_prompts_have_no_interval() -> None:
    ones, groups = np.ones((14, 2)), np.arange(14) % 7

    assert kid_replicates(ones, ones, groups) is None
    assert mmd_interval(0.0, ones, ones, groups, kernel=polynomial_kernel) is None


def test_paired_features_of_unequal_shape_are_refused() -> None:
    with pytest.raises(EvaluationError, match="paired features need one shape"):
        kid_replicates(np.ones((9, 2)), np.ones((8, 2)), np.arange(9), paired=True)
