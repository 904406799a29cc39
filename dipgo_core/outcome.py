"""SearchOutcome: what a search found, as plain data. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dipgo_core.errors import SearchError


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchOutcome:
    """Scores or step masks that serve every target (``postprocess.select``).

    scores: (T, N) keep-probabilities in [0, 1]; 1.0 for the first call.
    step_masks: number of computed calls -> which calls are computed, for strategies that skip
        whole calls.
    forwards: denoiser forwards spent, a batch counted as one.

    Raises:
        SearchError: neither scores nor masks, or scores that are not a finite (T, N) table.
    """

    scores: npt.NDArray[np.float64] | None = None
    step_masks: Mapping[int, tuple[int, ...]] | None = None
    forwards: int = 0

    def __post_init__(self) -> None:
        if (self.scores is None) == (self.step_masks is None):
            raise SearchError("a search outcome needs either scores or step_masks, and not both")
        if self.scores is None:
            return
        scores = np.array(self.scores, dtype=np.float64)
        if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
            raise SearchError(
                f"scores must be a finite table (calls, blocks), got shape {scores.shape} with "
                f"{int((~np.isfinite(scores)).sum())} values that are not finite"
            )
        scores.flags.writeable = False
        object.__setattr__(self, "scores", scores)

    def to_json(self) -> dict[str, Any]:
        masks = self.step_masks
        return {
            "scores": None if self.scores is None else self.scores.tolist(),
            "step_masks": None if masks is None else {str(k): list(v) for k, v in masks.items()},
            "forwards": self.forwards,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchOutcome:
        scores, masks = data.get("scores"), data.get("step_masks")
        return cls(
            scores=None if scores is None else np.array(scores, dtype=np.float64),
            step_masks=None if masks is None else {int(k): tuple(v) for k, v in masks.items()},
            forwards=int(data["forwards"]),
        )
