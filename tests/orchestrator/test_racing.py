"""Racing decisions. Oracles: brute force over pairs, simulated truth, normal and t quantiles."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import norm, t

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import Replicates, mean_replicates_of
from orchestrator.racing import (
    ALPHA,
    Candidate,
    Decision,
    _faster,
    _lower_bounds,
    alpha_of_rung,
    decide,
    raced_metrics,
)

Floats = npt.NDArray[np.float64]


MANY = 10**9


def race(
    qualities: dict[str, dict[str, Floats]],
    speeds: dict[str, float | None],
    *,
    alpha: float = ALPHA,
    top: int = MANY,
    bars: dict[str, tuple[str, ...]] | None = None,
    protected: tuple[str, ...] = (),
) -> Decision:
    """qualities: metric -> key -> score of each image."""
    candidates = [
        Candidate(key=k, speed=s, bars=(bars or {}).get(k, ()), protected=k in protected)
        for k, s in speeds.items()
    ]
    measured = {
        metric: {key: replicates(scores) for key, scores in known.items()}
        for metric, known in qualities.items()
    }
    return decide(candidates, measured, alpha=alpha, top=top)


def replicates(scores: Floats) -> Replicates:
    found = mean_replicates_of(scores, np.arange(len(scores)))
    assert found is not None
    return found


def scores(mean: float, seed: int, n: int = 128, spread: float = 1.0) -> Floats:
    """Scores that share the difficulty of each image, as those of one protocol do."""
    difficulty = np.random.default_rng(0).normal(0, 3, n)
    return mean + difficulty + np.random.default_rng(seed).normal(0, spread, n)


def test_decide_drops_what_a_faster_point_surely_beats() -> None:
    clip = {"slow": scores(30, 1), "fast": scores(33, 2), "good": scores(36, 3)}
    found = race({"clip": clip}, {"slow": 1.0, "fast": 2.0, "good": 1.5})
    assert found.kept == ("fast", "good")
    assert found.dropped == {"slow": {"clip": "good"}}


def test_decide_keeps_a_worse_point_that_is_faster() -> None:
    found = race({"clip": {"a": scores(30, 1), "b": scores(36, 2)}}, {"a": 2.0, "b": 1.9})
    assert found.dropped == {}


def test_decide_drops_one_of_equal_speed() -> None:
    found = race({"clip": {"a": scores(30, 1), "b": scores(36, 2)}}, {"a": 2.0, "b": 2.0})
    assert found.kept == ("b",)


@pytest.mark.parametrize(("reach", "kept"), [(0.0, ("b",)), (0.0005, ("a", "b"))])
def test_decide_drops_nobody_on_speed_noise(reach: float, kept: tuple[str, ...]) -> None:
    clip = {"a": replicates(scores(30, 1)), "b": replicates(scores(36, 2))}
    speeds = {"a": 1.4999, "b": 1.5000}
    candidates = [
        Candidate(key=k, speed=s, speed_low=s - reach, speed_high=s + reach)
        for k, s in speeds.items()
    ]
    assert decide(candidates, {"clip": clip}, alpha=ALPHA, top=MANY).kept == kept


def test_sure_speed_is_transitive() -> None:
    rng = np.random.default_rng(0)
    speeds = np.exp(rng.normal(0, 0.5, 60))
    low, high = speeds * np.exp(-rng.uniform(0, 0.4, 60)), speeds * np.exp(rng.uniform(0, 0.4, 60))
    faster = _faster([
        Candidate(key=str(i), speed=speeds[i], speed_low=low[i], speed_high=high[i])
        for i in range(60)
    ]).astype(int)  # fmt: skip
    assert faster.any() and not ((faster @ faster > 0) & (faster == 0)).any()


def test_decide_keeps_what_is_best_in_one_metric() -> None:
    qualities = {
        "clip": {"a": scores(30, 1), "b": scores(36, 2)},
        "psnr": {"a": scores(30, 3), "b": scores(30, 4)},
    }
    assert race(qualities, {"a": 1.0, "b": 1.0}).dropped == {}


def test_decide_lets_different_points_win_different_metrics() -> None:
    qualities = {
        "clip": {"a": scores(30, 1), "b": scores(36, 2), "c": scores(20, 5)},
        "psnr": {"a": scores(30, 3), "b": scores(20, 4), "c": scores(36, 6)},
    }
    found = race(qualities, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert found.dropped == {"a": {"clip": "b", "psnr": "c"}}


def test_decide_knows_that_less_kid_is_better() -> None:
    found = race({"kid": {"a": scores(3, 1), "b": scores(9, 2)}}, {"a": 1.0, "b": 1.0})
    assert found.kept == ("a",)


def test_decide_names_a_kept_winner() -> None:
    clip = {"a": scores(30, 1), "b": scores(33, 2), "c": scores(36, 3)}
    found = race({"clip": clip}, {"a": 1.0, "b": 1.5, "c": 2.0})
    assert found.kept == ("c",)
    assert found.dropped == {"a": {"clip": "c"}, "b": {"clip": "c"}}


@pytest.mark.parametrize("seed", range(5))
def test_decide_rests_every_drop_on_a_kept_point_that_is_better_and_as_fast(seed: int) -> None:
    rng = np.random.default_rng(seed)
    speeds = {str(i): float(rng.integers(1, 5)) for i in range(15)}
    quality = {k: {p: scores(rng.normal(30, 3), rng.integers(9999)) for p in speeds} for k in "xy"}
    named = {"clip": quality["x"], "psnr": quality["y"]}
    found = race(named, {**speeds})
    assert found.dropped
    for loser, winners in found.dropped.items():
        assert set(winners) == {"clip", "psnr"}
        for metric, winner in winners.items():
            assert winner in found.kept
            assert speeds[winner] >= speeds[loser]
            assert named[metric][winner].mean() > named[metric][loser].mean()


def test_decide_follows_a_chain_of_dropped_winners() -> None:
    # c differs from a by a constant, which alone decides nothing; b stands between them
    first = scores(30, 1)
    clip = {"a": first, "b": first + 3 + scores(0, 2) / 3, "c": first + 6}
    found = race({"clip": clip}, {"a": 1.0, "b": 1.0, "c": 1.0})
    assert found.dropped == {"a": {"clip": "c"}, "b": {"clip": "c"}}


@pytest.mark.parametrize("seed", range(5))
def test_sure_differences_are_transitive(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.normal(size=(101, 8)) @ rng.normal(size=(8, 8)) + rng.normal(0, 9, 8)
    sure = _lower_bounds(drawn, 1.5) > 0
    assert sure.any()
    assert not ((sure.astype(int) @ sure.astype(int) > 0) & ~sure).any()


def test_decide_keeps_the_protected() -> None:
    clip = {"dense": scores(30, 1), "b": scores(36, 2)}
    assert race({"clip": clip}, {"dense": 1.0, "b": 2.0}, protected=("dense",)).dropped == {}


def test_decide_keeps_the_bars_of_kept_points_only() -> None:
    clip = {
        "searched": scores(36, 1), "bar": scores(33, 2),
        "lost": scores(30, 3), "its bar": scores(28, 4),
    }  # fmt: skip
    bars = {"searched": ("bar",), "lost": ("its bar",)}
    found = race({"clip": clip}, dict.fromkeys(clip, 1.0), bars=bars)
    assert found.kept == ("searched", "bar")
    assert set(found.dropped) == {"lost", "its bar"}


def test_decide_keeps_what_lacks_a_metric_or_a_speed() -> None:
    qualities = {
        "clip": {"dense": scores(30, 1), "b": scores(36, 2), "unknown": scores(30, 3)},
        "psnr": {"b": scores(36, 4), "unknown": scores(30, 5)},
    }
    found = race(qualities, {"dense": 1.0, "b": 1.0, "unknown": None})
    assert found.dropped == {}


def test_decide_draws_nothing_from_equal_images() -> None:
    same = scores(30, 1)
    found = race({"clip": {"a": same, "b": same.copy()}}, {"a": 1.0, "b": 2.0})
    assert found == Decision(kept=("a", "b"), dropped={}, critical=None)


def test_decide_draws_nothing_from_a_difference_without_spread() -> None:
    base = scores(30, 1)
    found = race({"clip": {"a": base, "b": base + 5}}, {"a": 1.0, "b": 2.0})
    assert found.dropped == {}


def test_decide_of_one_point_keeps_it() -> None:
    assert race({"clip": {"a": scores(30, 1)}}, {"a": 1.0}).kept == ("a",)


def test_decide_needs_a_metric() -> None:
    with pytest.raises(EvaluationError, match="add kid"):
        race({}, {"a": 1.0})


def test_decide_refuses_replicates_of_other_images() -> None:
    clip = {"a": scores(30, 1), "b": scores(30, 2, n=64)}
    with pytest.raises(EvaluationError, match="not resampled alike"):
        race({"clip": clip}, {"a": 1.0, "b": 1.0})


def test_critical_value_of_one_pair_is_the_t_quantile() -> None:
    found = race({"clip": {"a": scores(30, 1, n=4000), "b": scores(30, 2, n=4000)}}, SPEEDS)
    assert found.critical == pytest.approx(t.ppf(1 - ALPHA, 3999), abs=0.15)


SPEEDS: dict[str, float | None] = {"a": 1.0, "b": 2.0}


def test_critical_value_grows_with_pairs_and_stays_below_bonferroni() -> None:
    keys = [str(i) for i in range(12)]
    clip = {key: scores(30, i, n=2000) for i, key in enumerate(keys)}
    many = race({"clip": clip}, dict.fromkeys(keys, 1.0)).critical
    assert many is not None
    assert norm.ppf(1 - ALPHA) + 0.5 < many < norm.ppf(1 - ALPHA / (12 * 11)) + 0.15


def test_critical_value_is_wider_for_few_images() -> None:
    known = {key: replicates(scores(30, i, n=240)) for i, key in enumerate("ab")}
    candidates = [Candidate(key=key, speed=1.0) for key in known]
    fewer = {key: dataclasses.replace(one, n=6) for key, one in known.items()}
    few, many = (
        decide(candidates, {"clip": each}, alpha=ALPHA, top=MANY).critical
        for each in (fewer, known)
    )
    assert few is not None and many is not None
    assert few > many + 0.2


def test_critical_value_shrinks_as_the_top_rung_is_near() -> None:
    clip = {"a": scores(30, 1), "b": scores(30, 2)}
    far, near = (race({"clip": clip}, SPEEDS, top=top).critical for top in (MANY, 256))
    assert far is not None
    assert near == pytest.approx(far / np.sqrt(2))


def test_decide_never_decides_by_one_image() -> None:
    with_one = {"a": Replicates(np.array([1.0, 2.0]), 1, 1), "b": Replicates(np.zeros(2), 1, 1)}
    candidates = [Candidate(key=key, speed=1.0) for key in with_one]
    assert decide(candidates, {"clip": with_one}, alpha=0.5, top=MANY).dropped == {}


def test_alpha_is_split_over_the_rungs_that_decide() -> None:
    assert alpha_of_rung(2) == ALPHA
    assert alpha_of_rung(5) == ALPHA / 4


def test_too_few_resamples_are_refused() -> None:
    drawn = np.random.default_rng(0).normal(size=(2, 11))
    known = {key: Replicates(drawn[i], 10, 10) for i, key in enumerate("ab")}
    candidates = [Candidate(key=key, speed=1.0) for key in known]
    with pytest.raises(EvaluationError, match="10 resamples"):
        decide(candidates, {"clip": known}, alpha=0.05, top=MANY)


def test_raced_metrics_are_all_but_fid() -> None:
    assert raced_metrics(("fid", "kid", "psnr")) == ("kid", "psnr")


def passes_a_bound(seed: int, prompts: int, top: int, n: int = 128) -> bool:
    """Race six equally good points; say whether any pair's difference, less what it is at the top
    rung, passes the bound that the race would call sure."""
    rng = np.random.default_rng(seed)
    shown = min(top, 512)
    own = rng.normal(0, 1, (prompts, 6))[np.arange(shown) % prompts]
    values = own + rng.exponential(1, (shown, 6)) if prompts < n else rng.exponential(1, (shown, 6))
    known = {str(i): replicates(column[:n]) for i, column in enumerate(values.T)}
    candidates = [Candidate(key=key, speed=1.0) for key in known]
    critical = decide(candidates, {"clip": known}, alpha=ALPHA, top=top).critical
    assert critical is not None
    at_top = values.mean(axis=0) if top == shown else np.ones(6)  # the mean they were drawn with
    columns = np.stack([one.values for one in known.values()], axis=1)
    return bool((_lower_bounds(columns, critical) > at_top[:, None] - at_top).any())


@pytest.mark.parametrize(
    ("prompts", "top", "races", "expected"),
    [
        (512, 512, 200, range(5, 17)),  # of 200 at 5 %, a binomial gives 5 to 16 in 95 % of cases
        (512, MANY, 200, range(5, 17)),
        (32, 512, 60, range(4)),  # every prompt was seen four times: fewer than 5 %
    ],
)
def test_bounds_of_a_race_are_passed_as_often_as_alpha_says(
    prompts: int, top: int, races: int, expected: range
) -> None:
    assert sum(passes_a_bound(seed, prompts, top) for seed in range(races)) in expected
