"""CMMD. Oracles: a double loop in float64, closed forms of points and of Gaussians."""

from __future__ import annotations

import math

import numpy as np
import pytest

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation import cmmd_distance
from dipgo_core.evaluation.cmmd_distance import cmmd, cmmd_figure, cmmd_replicates
from dipgo_core.evaluation.intervals import difference_of, interval_of
from dipgo_core.evaluation.reference import reference_of
from dipgo_core.evaluation.scorers import Scorer

CLIP = Scorer("clip", "0" * 64, "none")


def unit_rows(n: int, seed: int, shift: float = 0.0) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, 6))
    rows[:, 0] += shift
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def by_double_loop(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        difference = a.astype(np.float64) - b.astype(np.float64)
        return math.exp(-float(difference @ difference) / (2 * 10**2))

    n, m = len(x), len(y)
    within_x = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j)
    within_y = sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(a, b) for a in x for b in y)
    return 1000 * (within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2 * across / (n * m))


@pytest.mark.parametrize("rows", [7, 1024])
def test_cmmd_is_a_double_loop_whatever_the_chunk(rows: int, monkeypatch) -> None:
    monkeypatch.setattr(cmmd_distance, "_ROWS", rows)
    x, y = unit_rows(20, 0), unit_rows(15, 1, shift=1.0)

    assert cmmd(x, y) == pytest.approx(by_double_loop(x, y), abs=1e-6)


def test_two_orthogonal_points_are_as_far_as_the_kernel_says() -> None:
    x, y = np.tile([1.0, 0.0], (4, 1)), np.tile([0.0, 1.0], (3, 1))

    assert cmmd(x, y) == pytest.approx(2000 * (1 - math.exp(-2 / 200)), rel=1e-9)


def two_gaussians(seed: int, n: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """150 against 1,500 points of deviation 5, 4 apart in one of 3 directions."""
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(n, 3)) * 5, random.normal(size=(10 * n, 3)) * 5
    return x.astype(np.float32), (y + [4, 0, 0]).astype(np.float32)


def test_intervals_cover_the_distance_of_two_gaussians() -> None:
    width = 10**2 + 2 * 5**2
    exact = 2000 * (10**2 / width) ** 1.5 * (1 - math.exp(-(4**2) / (2 * width)))
    pairs = [two_gaussians(seed) for seed in range(20)]

    figures = [
        cmmd_figure(x, reference_of(y, CLIP, paired=False), np.arange(150)) for x, y in pairs
    ]

    covered = sum(f.low < exact < f.high for f in figures if f.low and f.high)
    assert covered >= 16  # of 20 at 95 %: fewer in 0.3 % of all sets of seeds
    assert np.mean([f.value for f in figures]) == pytest.approx(exact, rel=0.15)


@pytest.mark.parametrize("paired", [False, True])
def test_figure_is_cmmd_with_an_interval_around_it(paired: bool) -> None:
    x, y = unit_rows(40, 0), unit_rows(40, 1, shift=0.5)

    figure = cmmd_figure(x, reference_of(y, CLIP, paired=paired), np.arange(40) % 20)

    assert figure.value == pytest.approx(cmmd(x, y), abs=1e-9)
    assert figure.low is not None and figure.high is not None
    assert figure.low <= figure.value <= figure.high


def test_one_prompt_has_no_interval() -> None:
    figure = cmmd_figure(unit_rows(8, 0), reference_of(unit_rows(8, 1), CLIP), np.zeros(8))

    assert (figure.low, figure.high) == (None, None)


def test_replicates_subtract_to_the_difference_of_the_figures() -> None:
    x, z, y = unit_rows(60, 0, shift=1.0), unit_rows(60, 2), unit_rows(60, 1)
    groups = np.arange(60) % 30
    sides = [cmmd_replicates(rows, y, groups) for rows in (x, z)]
    assert sides[0] is not None and sides[1] is not None

    found = interval_of(difference_of(sides[0], sides[1]))

    assert found.low < cmmd(x, y) - cmmd(z, y) < found.high
    assert found.low > 0  # x is the farther one


def test_what_does_not_fit_is_refused() -> None:
    x = unit_rows(8, 0)
    with pytest.raises(EvaluationError, match="needs 2 images"):
        cmmd(x[:1], x)
    with pytest.raises(EvaluationError, match="do not fit a reference"):
        cmmd_figure(x[:, :3], reference_of(x, CLIP), np.arange(8))
    with pytest.raises(EvaluationError, match="has 8 images, there are 6"):
        cmmd_figure(x[:6], reference_of(x, CLIP), np.arange(6))
