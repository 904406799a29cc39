"""Intervals: estimates against independent formulas, coverage on synthetic draws."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)
from torch_fidelity.metric_kid import kernel_poly

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import (
    Figure,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_median,
    fid_jackknife,
    frechet_distance,
    kid_interval,
)

DRAWS = 200
COVERAGE = (0.90 * DRAWS, 0.99 * DRAWS)


def clustered(rng: np.random.Generator, prompts: int, per: int, dim: int = 1) -> np.ndarray:
    """Unit-variance rows of which those of one prompt correlate by one half."""
    shared = np.repeat(rng.normal(size=(prompts, dim)), per, axis=0)
    return (shared + rng.normal(size=(prompts * per, dim))) / np.sqrt(2)


def groups_of(prompts: int, per: int) -> np.ndarray:
    return np.repeat(np.arange(prompts), per)


@pytest.mark.parametrize(("prompts", "per"), [(100, 1), (40, 1), (50, 8)])
def test_mean_interval_covers_the_truth(prompts: int, per: int) -> None:
    # oracle: the mean the draws were made with, skewed by the exponential
    hits = 0
    for draw in range(DRAWS):
        values = np.exp(0.5 * clustered(np.random.default_rng(draw), prompts, per)[:, 0])
        interval = bootstrap_mean(values, groups_of(prompts, per))
        hits += interval.low <= np.exp(0.125) <= interval.high

    assert COVERAGE[0] <= hits <= COVERAGE[1]


def test_resampling_images_instead_of_prompts_would_not_cover() -> None:
    hits = 0
    for draw in range(60):
        values = clustered(np.random.default_rng(draw), 50, 8)[:, 0]
        interval = bootstrap_mean(values, np.arange(400))
        hits += interval.low <= 0 <= interval.high

    assert hits < 0.8 * 60


def test_difference_interval_covers_and_is_narrower_than_unpaired() -> None:
    hits = 0
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        a = clustered(rng, 50, 4)[:, 0]
        b = a + 0.1 + 0.1 * clustered(rng, 50, 4)[:, 0]
        interval = bootstrap_difference(b, a, groups_of(50, 4))
        hits += interval.low <= 0.1 <= interval.high

    assert COVERAGE[0] <= hits <= COVERAGE[1]
    assert interval.high - interval.low < 0.2


@pytest.mark.parametrize("paired", [False, True])
def test_kid_interval_covers_the_truth(paired: bool) -> None:
    # oracle: textbook KID of 2,500 fresh rows
    fixed = np.random.default_rng(1).normal(size=(300, 4))
    hits = 0
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        x = clustered(rng, 40, 3, 4) + 0.5
        y = clustered(rng, 40, 3, 4) if paired else fixed
        value = kid(x, y)
        interval = kid_interval(value, x, y, groups_of(40, 3), paired=paired, resamples=300)
        hits += interval.low <= kid_truth(paired) <= interval.high

    assert COVERAGE[0] <= hits <= COVERAGE[1]


def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD by torch-fidelity's kernel and the textbook sums."""
    xx, yy, xy = kernel_poly(x, x), kernel_poly(y, y), kernel_poly(x, y)
    n, m = len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(within - 2 * xy.mean())


_TRUTHS: dict[bool, float] = {}


def kid_truth(paired: bool) -> float:
    if paired not in _TRUTHS:
        rng = np.random.default_rng(99)
        x = rng.normal(size=(2500, 4)) + 0.5
        fixed = np.random.default_rng(1).normal(size=(300, 4))
        _TRUTHS[paired] = kid(x, rng.normal(size=(2500, 4)) if paired else fixed)
    return _TRUTHS[paired]


def test_many_prompts_are_bunched_and_give_the_same_width(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 4)) + 0.3, rng.normal(size=(500, 4))
    whole = kid_interval(0.0, x, y, np.arange(600))
    monkeypatch.setattr("dipgo_core.evaluation.intervals.MAX_GROUPS", 200)

    bunched = kid_interval(0.0, x, y, np.arange(600))

    assert bunched.high - bunched.low == pytest.approx(whole.high - whole.low, rel=0.25)


@pytest.mark.parametrize("per", [1, 4])
def test_fid_jackknife_covers_the_truth(per: int) -> None:
    # oracle: FID of two Gaussians with unit covariance is the squared distance of their means
    hits = 0
    for draw in range(DRAWS):
        x = clustered(np.random.default_rng(draw), 512 // per, per, 8) + 0.25
        interval = fid_jackknife(x, (np.zeros(8), np.eye(8)), groups_of(512 // per, per))
        hits += interval.low <= 8 * 0.25**2 <= interval.high

    assert COVERAGE[0] <= hits <= COVERAGE[1]


def test_fid_jackknife_removes_the_bias() -> None:
    corrected, plain = [], []
    for draw in range(50):
        x = np.random.default_rng(draw).normal(size=(256, 8)) + 0.25
        corrected.append(fid_jackknife(x, (np.zeros(8), np.eye(8)), np.arange(256)).value)
        plain.append(frechet_distance(x.mean(0), np.cov(x.T), np.zeros(8), np.eye(8)))

    assert abs(np.mean(corrected) - 0.5) < 0.25 * abs(np.mean(plain) - 0.5)


def test_fid_jackknife_of_paired_dense_images_covers_zero_change() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(512, 8))

    interval = fid_jackknife(
        dense + 0.01 * rng.normal(size=(512, 8)), dense, np.arange(512), paired=True
    )

    assert interval.low <= 1e-3
    assert interval.high < 0.01


@pytest.mark.parametrize(("images", "prompts"), [(31, 31), (300, 31)])
def test_fid_jackknife_refuses_what_it_cannot_bound(images: int, prompts: int) -> None:
    x = np.random.default_rng(0).normal(size=(images, 8))

    assert fid_jackknife(x, x, np.arange(images) % prompts) is None


@pytest.mark.parametrize("seed", range(5))
def test_frechet_distance_equals_torch_fidelity(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(16, 16))
    x, y = rng.normal(size=(200, 16)) @ mix + 0.3, rng.normal(size=(300, 16))
    a, b = (fid_features_to_statistics(torch.from_numpy(rows)) for rows in (x, y))

    value = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])

    expected = fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]
    assert value == pytest.approx(expected, rel=1e-6)


def test_leave_one_out_of_the_jackknife_equals_recomputing() -> None:
    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(64, 3)) + 5.0, rng.normal(size=(80, 3))
    moments = (reference.mean(0), np.cov(reference.T))
    order = np.random.default_rng(0).permutation(64) % 32

    interval = fid_jackknife(x, reference, np.arange(64))

    without = [
        frechet_distance(part.mean(0), np.cov(part.T), *moments)
        for part in (x[order != block] for block in range(32))
    ]
    whole = frechet_distance(x.mean(0), np.cov(x.T), *moments)
    assert interval.value == pytest.approx(32 * whole - 31 * np.mean(without), rel=1e-9)


def test_intervals_are_repeatable_and_contain_their_value() -> None:
    values = np.random.default_rng(0).normal(size=60)

    first, second = (bootstrap_mean(values, np.arange(60)) for _ in range(2))

    assert first == second
    assert first.low <= first.value <= first.high
    assert first.value == pytest.approx(values.mean())


def test_equal_values_have_a_closed_interval() -> None:
    interval = bootstrap_mean(np.full(20, 0.1), np.arange(20))

    assert (interval.low, interval.value, interval.high) == pytest.approx((0.1, 0.1, 0.1))


def test_one_prompt_has_no_interval() -> None:
    one = np.zeros(5, dtype=int)

    assert bootstrap_mean(np.arange(5), one) is None
    assert kid_interval(0.0, np.ones((5, 2)), np.ones((5, 2)), one) is None


def test_thousand_resamples_of_five_thousand_prompts_take_under_a_second() -> None:
    values = np.random.default_rng(0).normal(size=5000)
    start = time.process_time()

    bootstrap_mean(values, np.arange(5000))

    assert time.process_time() - start < 1


def test_median_interval_contains_the_median_of_many_draws() -> None:
    hits = 0
    for draw in range(DRAWS):
        interval = bootstrap_median(np.random.default_rng(draw).exponential(size=40))
        hits += interval.low <= np.log(2) <= interval.high

    assert COVERAGE[0] <= hits <= COVERAGE[1]


def test_figures_refuse_what_is_no_number() -> None:
    assert Figure.from_json(Figure(1.0, 0.5, 2.0, 10, "x").to_json()) == Figure(
        1.0, 0.5, 2.0, 10, "x"
    )
    with pytest.raises(EvaluationError, match="came out as nan"):
        Figure(float("nan"), None, None, 10)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(EvaluationError, match="same images, got 3 and 4"):
        bootstrap_difference(np.ones(3), np.ones(4), np.arange(3))
    with pytest.raises(EvaluationError, match="each image needs its prompt"):
        bootstrap_mean(np.ones(3), np.arange(4))
