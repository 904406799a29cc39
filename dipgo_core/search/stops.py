"""When a search by gradient leads nowhere: gates collapsed, or the pull towards sparsity is lost.

A search serves every target, so all gates kept, or none, for half of it is what no target asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.config import SearchSettings

#: Updates that a search may go on leading nowhere: this share of all, and at least so many.
PATIENCE_SHARE = 0.5
MIN_PATIENCE = 50
#: A mean of probabilities that has moved by less has not moved.
STILL = 1e-3

_ADVICE = "raise search.learning_rate, lower search.loss.alpha, or set search.sampling to gumbel"
_PUSH = "raise search.learning_rate, or set search.start to random"


def patience(settings: SearchSettings) -> int:
    """Return after how many updates that lead nowhere a search is stopped."""
    return max(MIN_PATIENCE, int(PATIENCE_SHARE * settings.steps))


@dataclass(frozen=True, eq=False)
class LastGood:
    """What a search had learned when last some of its gates, but not all, were kept."""

    search_step: int
    p_keep: npt.NDArray[np.float64]
    last_needed: npt.NDArray[np.int64]


class Watch:
    """Tells why a search is to be stopped. first: p_keep as the search begins.  # (T, S)"""

    def __init__(self, settings: SearchSettings, first: npt.NDArray[np.float64]) -> None:
        self._warmup, self._patience = settings.warmup_steps, patience(settings)
        self._first = first[1:]
        self._idle = 0
        self.good: LastGood | None = None

    def note(
        self,
        search_step: int,
        keep: npt.NDArray[np.bool_],
        p_keep: npt.NDArray[np.float64],
        last_needed: npt.NDArray[np.int64],
    ) -> str | None:
        """Take in an update; return the reason if the search leads nowhere.

        keep: (T, S), the gates it was made with. p_keep, last_needed: (T, S), as they are after it.
        """
        searched = keep[1:]
        if searched.any() and not searched.all():
            self._idle = 0
            self.good = LastGood(search_step, p_keep, last_needed.copy())
        elif search_step > self._warmup:
            self._idle += 1
        if self._idle >= self._patience:
            what, advice = ("all", _PUSH) if searched.all() else ("none", _ADVICE)
            return (
                f"{what} of the searched gates were kept in the last {self._idle} steps: {advice}"
            )
        if search_step == self._warmup + self._patience and self._is_still(p_keep[1:]):
            return f"the gates have not moved in {search_step} steps: {_PUSH}"
        return None

    def _is_still(self, p_keep: npt.NDArray[np.float64]) -> bool:
        same = np.array_equal(p_keep >= 0.5, self._first >= 0.5)
        return same and float(np.abs(p_keep - self._first).mean()) < STILL

    def to_tensors(self) -> dict[str, Tensor]:
        found = {"idle": torch.tensor(self._idle)}
        if self.good is not None:
            found["step"] = torch.tensor(self.good.search_step)
            found["p_keep"] = torch.from_numpy(self.good.p_keep.copy())
            found["last_needed"] = torch.from_numpy(self.good.last_needed.copy())
        return found

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from `to_tensors`."""
        self._idle = int(state["idle"])
        if "step" in state:
            p_keep, last_needed = state["p_keep"].numpy(), state["last_needed"].numpy()
            self.good = LastGood(int(state["step"]), p_keep.copy(), last_needed.copy())
