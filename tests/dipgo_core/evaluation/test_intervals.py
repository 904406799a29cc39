"""Intervals from replicates: independent formulas, and coverage on synthetic draws."""

from __future__ import annotations

import numpy as np
import pytest

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import (
    Figure,
    Interval,
    Replicates,
    average_of,
    bootstrap_mean,
    bootstrap_median,
    difference_of,
    interval_of,
    mean_replicates_of,
    unpaired_gap,
    unpaired_ratio,
)
from tests.support.synthetic import COVERED, DRAWS, SIZES, clustered, groups_of

SETS = [SIZES["alone"], SIZES["few"], SIZES["equal"], SIZES["unequal"]]


@pytest.mark.parametrize("sizes", SETS, ids=SIZES)
def test_mean_interval_covers_the_truth(sizes: np.ndarray) -> None:
    # oracle: the mean the draws were made with, skewed by the exponential
    hits = 0
    for draw in range(DRAWS):
        values = np.exp(0.5 * clustered(np.random.default_rng(draw), sizes)[:, 0])
        interval = bootstrap_mean(values, groups_of(sizes))
        hits += interval.low <= np.exp(0.125) <= interval.high

    assert hits in COVERED


def test_resampling_images_instead_of_prompts_would_not_cover() -> None:
    sizes = np.full(50, 8)
    hits = 0
    for draw in range(60):
        values = clustered(np.random.default_rng(draw), sizes)[:, 0]
        interval = bootstrap_mean(values, np.arange(400))
        hits += interval.low <= 0 <= interval.high

    assert hits < 0.8 * 60


@pytest.mark.parametrize("sizes", SETS, ids=SIZES)
def test_paired_difference_covers_and_is_narrower_than_unpaired(sizes: np.ndarray) -> None:
    # oracle: the shift that one side was made with
    hits = 0
    for draw in range(DRAWS):
        rng = np.random.default_rng(draw)
        a = clustered(rng, sizes)[:, 0]
        b = a + 0.1 + 0.1 * clustered(rng, sizes)[:, 0]
        sides = [mean_replicates_of(side, groups_of(sizes)) for side in (b, a)]
        interval = interval_of(difference_of(*sides))
        hits += interval.low <= 0.1 <= interval.high

    assert hits in COVERED
    alone = interval_of(sides[0])
    assert interval.high - interval.low < 0.25 * (alone.high - alone.low)


def test_replicates_of_a_difference_equal_the_difference_of_replicates() -> None:
    rng, groups = np.random.default_rng(0), np.arange(60) % 20
    a, b = rng.normal(size=60), rng.normal(size=60)

    apart = difference_of(mean_replicates_of(a, groups), mean_replicates_of(b, groups))

    assert apart.values == pytest.approx(mean_replicates_of(a - b, groups).values)
    assert interval_of(apart).value == pytest.approx(np.mean(a - b))


def test_replicates_are_means_of_the_drawn_prompts() -> None:
    # oracle: each resample's mean lies between the extreme prompts; its spread is the textbook one
    values = np.random.default_rng(0).normal(size=400)

    drawn = mean_replicates_of(values, np.arange(400), resamples=4000).values

    assert drawn[0] == pytest.approx(values.mean())
    assert drawn[1:].std() == pytest.approx(values.std() / 20, rel=0.05)
    assert np.abs(drawn).max() < np.abs(values).max()


def test_average_of_draws_is_their_mean() -> None:
    rows = [np.random.default_rng(draw).normal(size=30) for draw in range(3)]

    whole = average_of([mean_replicates_of(row, np.arange(30)) for row in rows])

    assert whole.values == pytest.approx(
        mean_replicates_of(np.mean(rows, axis=0), np.arange(30)).values
    )


@pytest.mark.parametrize(
    "other",
    [
        mean_replicates_of(np.arange(21.0), np.arange(21)),
        mean_replicates_of(np.arange(20.0), np.arange(20) % 10),
        mean_replicates_of(np.arange(20.0), np.arange(20), resamples=50),
        Replicates(np.zeros(1001), 20, 20, "jackknife"),
    ],
    ids=["images", "prompts", "resamples", "method"],
)
def test_figures_that_were_not_resampled_alike_are_not_subtracted(other: Replicates) -> None:
    one = mean_replicates_of(np.arange(20.0), np.arange(20))

    with pytest.raises(EvaluationError, match="only figures of the same images"):
        difference_of(one, other)


def test_very_many_prompts_are_bunched_and_give_the_same_width(monkeypatch) -> None:
    values, groups = np.random.default_rng(0).normal(size=1500), np.arange(1500)
    whole = bootstrap_mean(values, groups)
    monkeypatch.setattr("dipgo_core.evaluation.intervals.MAX_GROUPS", 400)

    bunched = bootstrap_mean(values, groups)

    assert bunched.value == whole.value
    assert bunched.high - bunched.low == pytest.approx(whole.high - whole.low, rel=0.15)


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
    assert bootstrap_mean(np.arange(5), np.zeros(5, dtype=int)) is None


def test_median_interval_contains_the_median_of_many_draws() -> None:
    hits = 0
    for draw in range(DRAWS):
        interval = bootstrap_median(np.random.default_rng(draw).exponential(size=40))
        hits += interval.low <= np.log(2) <= interval.high

    assert hits in COVERED


def test_figures_refuse_what_is_no_number() -> None:
    assert Figure.from_json(Figure(1.0, 0.5, 2.0, 10, "x").to_json()) == Figure(
        1.0, 0.5, 2.0, 10, "x"
    )
    with pytest.raises(EvaluationError, match="came out as nan"):
        Figure(float("nan"), None, None, 10)


def test_scores_without_their_prompts_are_refused() -> None:
    with pytest.raises(EvaluationError, match="each image needs its prompt"):
        bootstrap_mean(np.ones(3), np.arange(4))


def test_unpaired_gap_covers_the_difference_of_independent_means() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        a, b = (Interval(m, m - 1.96, m + 1.96) for m in rng.normal((3.0, 1.0), 1.0))
        gap = unpaired_gap(a, b)
        covered += gap.low <= 2.0 <= gap.high
    assert 0.92 <= covered / 400 <= 0.98


def test_unpaired_ratio_is_the_gap_of_logarithms() -> None:
    # by hand: ln 4 - ln 2, each reaching ln 2 to either side
    found = unpaired_ratio(Interval(4.0, 2.0, 8.0), Interval(2.0, 1.0, 4.0))
    reach = np.log(2) * np.sqrt(2)
    assert found.value == pytest.approx(np.log(2))
    assert (found.low, found.high) == pytest.approx((np.log(2) - reach, np.log(2) + reach))
