"""FID's intervals and its extrapolation: against closed forms, and what would be wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.fid_intervals import (
    fid_infinity,
    fid_jackknife,
    fid_replicates,
    frechet_distance,
    moments,
)
from dipgo_core.evaluation.intervals import difference_of, interval_of
from tests.support.synthetic import COVERED, DRAWS, clustered, groups_of, similar

DIM, SHIFT = 8, 0.25
#: FID of two Gaussians with unit covariance is the squared distance of their means.
TRUTH = DIM * SHIFT**2
STANDARD = (np.zeros(DIM), np.eye(DIM))
Floats = np.ndarray


def fid(x: Floats) -> float:
    return frechet_distance(x.mean(axis=0), np.cov(x.T), *STANDARD)


@pytest.mark.parametrize("images", [4 * DIM, 512])
@pytest.mark.parametrize("per", [1, 4])
def test_fid_jackknife_covers_the_truth(per: int, images: int) -> None:
    sizes, hits = np.full(max(32, images // per), per), 0
    for draw in range(DRAWS):
        x = clustered(np.random.default_rng(draw), sizes, DIM) + SHIFT
        interval = fid_jackknife(x, STANDARD, groups_of(sizes))
        hits += interval.low <= TRUTH <= interval.high

    assert hits in COVERED


def plain_jackknife(x: Floats) -> tuple[float, float]:
    """The textbook jackknife interval around FID itself: wrong, for it keeps the bias."""
    left_out = fid_replicates(x, STANDARD_OF[x.shape[1]], np.arange(len(x))).values
    whole, without = left_out[0], left_out[1:]
    reach = 2.04 * np.sqrt(31 / 32 * ((without - without.mean()) ** 2).sum())
    return whole - reach, whole + reach


def percentile_bootstrap(x: Floats, rng: np.random.Generator) -> tuple[float, float]:
    """The textbook bootstrap of FID: wrong, for each resample adds the bias once more."""
    dim = x.shape[1]
    drawn = (x[rng.integers(0, len(x), len(x))] for _ in range(40))
    values = [frechet_distance(y.mean(axis=0), np.cov(y.T), *STANDARD_OF[dim]) for y in drawn]
    return float(np.min(values)), float(np.max(values))


STANDARD_OF = {48: (np.zeros(48), np.eye(48))}


@pytest.mark.slow
def test_bootstrap_and_plain_jackknife_never_cover_where_ours_does() -> None:
    # oracle: two equal-covariance Gaussians of 48 features, 4 images a feature; a bound so generous
    # as the extremes of all resamples still misses
    dim, truth, hits = 48, 48 * 0.1**2, {"ours": 0, "plain": 0, "bootstrap": 0}
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        x = rng.normal(size=(4 * dim, dim)) + 0.1
        ours = fid_jackknife(x, STANDARD_OF[dim], np.arange(len(x)))
        plain, boot = plain_jackknife(x), percentile_bootstrap(x, rng)
        hits["ours"] += ours.low <= truth <= ours.high
        hits["plain"] += plain[0] <= truth <= plain[1]
        hits["bootstrap"] += boot[0] <= truth <= boot[1]

    assert hits["ours"] in COVERED
    assert (hits["plain"], hits["bootstrap"]) == (0, 0)


def test_fid_jackknife_removes_the_bias() -> None:
    corrected, plain = [], []
    for draw in range(50):
        x = np.random.default_rng(draw).normal(size=(256, DIM)) + SHIFT
        corrected.append(fid_jackknife(x, STANDARD, np.arange(256)).value)
        plain.append(fid(x))

    assert abs(np.mean(corrected) - TRUTH) < 0.25 * abs(np.mean(plain) - TRUTH)


@pytest.mark.parametrize("paired", [False, True])
def test_fid_infinity_is_closer_to_the_truth_than_fid(paired: bool) -> None:
    # oracle: the closed form, over 60 draws at 16 images a feature
    sizes, found, plain = np.ones(16 * DIM, dtype=int), [], []
    for draw in range(60):
        rng = np.random.default_rng(draw)
        dense = clustered(rng, sizes, DIM)
        x = similar(rng, dense, sizes, 0.5) + SHIFT
        side = dense if paired else STANDARD
        found.append(fid_infinity(x, side, np.arange(len(x)), paired=paired))
        theirs = moments(dense) if paired else STANDARD
        plain.append(frechet_distance(*moments(x), *theirs))

    assert abs(np.mean(found) - TRUTH) < 0.3 * abs(np.mean(plain) - TRUTH)
    assert np.mean(np.abs(np.subtract(found, TRUTH))) < np.mean(np.abs(np.subtract(plain, TRUTH)))


def test_fid_infinity_equals_a_line_through_both_sizes() -> None:
    # oracle: at 8 images a feature only the whole and its halves are large enough; two points
    x = np.random.default_rng(0).normal(size=(8 * DIM, DIM))
    half = np.random.default_rng(0).permutation(len(x)) % 2
    halves = np.mean([fid(x[half == part] + SHIFT) for part in (0, 1)])

    found = fid_infinity(x + SHIFT, STANDARD, np.arange(len(x)))

    assert found == pytest.approx(2 * fid(x + SHIFT) - halves)


def test_fid_infinity_needs_eight_images_a_feature() -> None:
    x = np.random.default_rng(0).normal(size=(8 * DIM - 1, DIM))

    assert fid_infinity(x, STANDARD, np.arange(len(x))) is None


@pytest.mark.parametrize("sizes", [np.ones(512, dtype=int), np.full(128, 4)], ids=["1", "4"])
def test_fid_difference_covers_the_truth(sizes: np.ndarray) -> None:
    # oracle: the difference of two closed forms; both sides show the same noise
    hits, expected = 0, DIM * (0.3**2 - SHIFT**2)
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        a = clustered(rng, sizes, DIM)
        b = similar(rng, a, sizes, 0.9)
        sides = [fid_replicates(x, STANDARD, groups_of(sizes)) for x in (a + 0.3, b + SHIFT)]
        interval = interval_of(difference_of(*sides))
        hits += interval.low <= expected <= interval.high

    assert hits in COVERED


def test_fid_is_not_subtracted_at_unequal_n() -> None:
    x = np.random.default_rng(0).normal(size=(128, DIM))
    one, other = (fid_replicates(x[:n], STANDARD, np.arange(n)) for n in (64, 128))

    with pytest.raises(EvaluationError, match="compare at equal n and equal seeds"):
        difference_of(one, other)


def test_fid_jackknife_of_paired_dense_images_covers_zero_change() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(512, DIM))

    interval = fid_jackknife(
        dense + 0.01 * rng.normal(size=(512, DIM)), dense, np.arange(512), paired=True
    )

    assert interval.low <= 1e-3
    assert interval.high < 0.01


@pytest.mark.parametrize(("images", "prompts"), [(31, 31), (300, 31)])
def test_fid_jackknife_refuses_what_it_cannot_bound(images: int, prompts: int) -> None:
    x = np.random.default_rng(0).normal(size=(images, DIM))

    assert fid_jackknife(x, x, np.arange(images) % prompts) is None


@pytest.mark.parametrize(("images", "trusted"), [(63, False), (64, True)])
def test_fid_jackknife_asks_for_four_images_a_feature(images: int, trusted: bool) -> None:
    x = np.random.default_rng(0).normal(size=(images, 16))  # more prompts than blocks

    assert (fid_jackknife(x, x, np.arange(images)) is not None) == trusted


@pytest.mark.parametrize("rank", [16, 7])
def test_frechet_distance_equals_torch_fidelity(rank: int) -> None:
    rng = np.random.default_rng(rank)
    mix = rng.normal(size=(16, rank)) @ rng.normal(size=(rank, 16))
    x, y = rng.normal(size=(200, 16)) @ mix + 0.3, rng.normal(size=(300, 16)) @ mix
    a, b = (fid_features_to_statistics(torch.from_numpy(rows)) for rows in (x, y))

    value = frechet_distance(a["mu"], a["sigma"], b["mu"], b["sigma"])

    expected = fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]
    assert value == pytest.approx(expected, rel=1e-6)


def test_moments_are_those_of_numpy_whatever_the_offset() -> None:
    x = (np.random.default_rng(0).normal(size=(3000, 5)) + 1000).astype(np.float32)

    mean, covariance = moments(x)

    assert mean == pytest.approx(x.astype(np.float64).mean(axis=0), rel=1e-12)
    assert covariance == pytest.approx(np.cov(x.astype(np.float64), rowvar=False), rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_leave_one_out_equals_recomputing(paired: bool) -> None:
    rng = np.random.default_rng(0)
    x, reference = rng.normal(size=(64, 3)) + 5.0, rng.normal(size=(64, 3))
    order = np.random.default_rng(0).permutation(64) % 32

    found = fid_replicates(x, reference, np.arange(64), paired=paired).values

    for block in range(32):
        ours, rest = x[order != block], reference[order != block] if paired else reference
        expected = frechet_distance(ours.mean(0), np.cov(ours.T), rest.mean(0), np.cov(rest.T))
        assert found[1 + block] == pytest.approx(expected, rel=1e-9)


def test_paired_features_of_unequal_shape_are_refused() -> None:
    x = np.random.default_rng(0).normal(size=(64, DIM))

    with pytest.raises(EvaluationError, match="paired features need one shape"):
        fid_jackknife(x, x[:60], np.arange(64), paired=True)
    with pytest.raises(EvaluationError, match="and moments"):
        fid_jackknife(x, STANDARD, np.arange(64), paired=True)
