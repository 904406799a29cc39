"""Synthetic draws of which the truth is known: images of one prompt correlate, prompts do not."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Sizes = npt.NDArray[np.int64]

DRAWS: Final = 200
#: How many of the draws a 95 % interval may cover: 90 % to 99 %.
COVERED: Final = range(180, 199)

#: Images of each prompt, by name.
SIZES: Final[dict[str, Sizes]] = {
    "alone": np.ones(100, dtype=np.int64),
    "few": np.ones(40, dtype=np.int64),
    "equal": np.full(50, 4),
    "unequal": np.random.default_rng(5).integers(1, 9, 60),
}


def groups_of(sizes: Sizes) -> Sizes:
    """The prompt of each image."""
    return np.repeat(np.arange(len(sizes)), sizes)


def clustered(rng: np.random.Generator, sizes: Sizes, dim: int = 1) -> Floats:
    """Standard normal rows; those of one prompt correlate by one half.  # (sum of sizes, dim)"""
    shared = np.repeat(rng.normal(size=(len(sizes), dim)), sizes, axis=0)
    drawn: Floats = (shared + rng.normal(size=(int(sizes.sum()), dim))) / np.sqrt(2)
    return drawn


def similar(rng: np.random.Generator, rows: Floats, sizes: Sizes, correlation: float) -> Floats:
    """Other rows of the same distribution, each correlated with its own row of `rows`."""
    fresh = clustered(rng, sizes, rows.shape[1])
    return correlation * rows + np.sqrt(1 - correlation**2) * fresh
