"""Predicted error of a gate table: measured single reuses first, corrected by every run made.

The error a SubNet ends with is taken for the sum of one unknown vector a reuse. Before any run
these are Gaussian of mean zero with the covariances that were measured (`search.errors`); every run
of a table tells one such sum, and the Gaussian is conditioned on it. So the surrogate learns what
superposition misses exactly where the search looks. Pure numpy.

Source: Rasmussen and Williams, Gaussian Processes for Machine Learning, equations 2.25 and 2.26.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dipgo_core.search.objective import SMALLEST

#: Share of a run's own variance that no other run can tell: superposition is not exact.
UNSHARED = 0.05

Floats = npt.NDArray[np.float64]


class Surrogate:
    """A Gaussian over the errors of reuses, and what it says of a table's error.

    covariances: (T, M, M), M reuses a call; mean squares an element.
    """

    def __init__(self, covariances: Floats) -> None:
        self._covariances = covariances
        self._width = covariances.shape[1]
        self._scale = 1.0
        self._among: Floats = np.zeros((0, 0))  # (D, D): covariance of runs with each other
        self._rows: Floats = np.zeros((0, covariances.shape[0] * self._width))  # with each reuse
        self._vectors: list[Floats] = []  # (B, d) of each run
        self._grams: Floats = np.zeros((0, 0, 0))  # (B, D, D)

    def learn(self, reuses: npt.NDArray[np.int64], vectors: npt.NDArray[np.float32]) -> None:
        """Add what a run of a table ended with.  # reuses (r,), vectors (B, d)"""
        self._vectors.append(vectors.astype(np.float64))
        shared, own = self._rows[:, reuses].sum(1), self._own(reuses)
        self._rows = np.concatenate([self._rows, self._row(reuses)])
        self._among = np.block([[self._among, shared[:, None]], [shared[None], own]])
        stacked = np.stack(self._vectors)
        self._grams = np.einsum("ibd,jbd->bij", stacked, stacked)
        squares = self._grams.diagonal(axis1=1, axis2=2).mean(0)
        owns = self._among.diagonal()
        logs = np.log(np.maximum(squares, SMALLEST) / np.maximum(owns, SMALLEST))
        self._scale = float(np.exp(logs.mean()))
        self._inverse = np.linalg.inv(self._among + np.diag(UNSHARED * owns + SMALLEST))

    def _row(self, reuses: npt.NDArray[np.int64]) -> Floats:
        """Return the covariance of a table's error with each single reuse.  # (1, T * M)"""
        found = np.zeros((len(self._covariances), self._width))
        for call in np.unique(reuses // self._width):
            chosen = reuses[reuses // self._width == call] % self._width
            found[call] = self._covariances[call][chosen].sum(0)
        return found.reshape(1, -1)

    def score(self, reuses: npt.NDArray[np.int64], doubt: float = 1.0) -> float:
        """Return the log mean square to expect of a table's error, over images.

        doubt: how much of what no run has told yet counts; less than 1 is hopeful.
        """
        means, left = self._expected(reuses)
        return float(np.log(means + doubt * left + SMALLEST).mean())

    def novelty(self, reuses: npt.NDArray[np.int64]) -> float:
        """Return the share of a table's error that no run has told of yet, in [0, 1]."""
        means, left = self._expected(reuses)
        return left / (float(means.mean()) + left + SMALLEST)

    def _expected(self, reuses: npt.NDArray[np.int64]) -> tuple[Floats, float]:
        """Return the mean square of what is known of a table's error, by image, and the rest."""
        own = self._own(reuses)
        if not self._vectors:
            return np.zeros(1), own
        shared = self._rows[:, reuses].sum(1)  # (D,)
        weights = self._inverse @ shared
        left = max(own - float(shared @ weights), 0.0) * self._scale
        means = np.einsum("i,bij,j->b", weights, self._grams, weights)
        return np.maximum(means, 0.0), left

    def _own(self, reuses: npt.NDArray[np.int64]) -> float:
        """Return the variance of a table's error before any run."""
        width, total = self._width, 0.0
        start = 0
        calls = reuses // width
        while start < len(reuses):  # reuses come call by call
            end = int(np.searchsorted(calls, calls[start], side="right"))
            chosen = reuses[start:end] - calls[start] * width
            total += float(self._covariances[calls[start]][chosen[:, None], chosen].sum())
            start = end
        return total
