"""SearchOutcome: what a search found, as plain data. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from dipgo_core.errors import SearchError


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchOutcome:
    """Scores or step masks that serve every target, or a gate table a target.

    ``postprocess.select`` gives the SubNet of a target.

    scores: (T, N) keep-probabilities in [0, 1]; 1.0 for the first call.
    step_masks: number of computed calls -> which calls are computed, for strategies that skip
        whole calls.
    tables: target -> rows as of ``GateTable.to_strings``, for strategies that search at a budget.
    extrapolations: target -> extrapolation of its table, where there is one (``GateTable``).
    forwards: denoiser forwards spent, a batch counted as one.
    sample_forwards: what they cost in dense forwards of one image: a forward of a batch counts its
        images, one that leaves blocks out its share of the MACs, a backward pass twice.

    Raises:
        SearchError: not exactly one of the three, or scores that are not a finite (T, N) table.
    """

    scores: npt.NDArray[np.float64] | None = None
    step_masks: Mapping[int, tuple[int, ...]] | None = None
    tables: Mapping[float, tuple[str, ...]] | None = None
    extrapolations: Mapping[float, float] = field(default_factory=dict)
    forwards: int = 0
    sample_forwards: float = 0.0

    def __post_init__(self) -> None:
        forms = (self.scores, self.step_masks, self.tables)
        if sum(form is not None for form in forms) != 1:
            raise SearchError("a search outcome needs one of scores, step_masks and tables")
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
        masks, tables = self.step_masks, self.tables
        return {
            "scores": None if self.scores is None else self.scores.tolist(),
            "step_masks": None if masks is None else {str(k): list(v) for k, v in masks.items()},
            "tables": None if tables is None else {str(t): list(r) for t, r in tables.items()},
            "extrapolations": {str(t): share for t, share in self.extrapolations.items()},
            "forwards": self.forwards,
            "sample_forwards": self.sample_forwards,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SearchOutcome:
        scores, masks, tables = (data.get(name) for name in ("scores", "step_masks", "tables"))
        return cls(
            scores=None if scores is None else np.array(scores, dtype=np.float64),
            step_masks=None if masks is None else {int(k): tuple(v) for k, v in masks.items()},
            tables=None if tables is None else {float(t): tuple(r) for t, r in tables.items()},
            extrapolations={float(t): s for t, s in data.get("extrapolations", {}).items()},
            forwards=int(data["forwards"]),
            sample_forwards=float(data["sample_forwards"]),
        )
