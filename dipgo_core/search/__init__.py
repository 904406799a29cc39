"""Search strategies behind one signature; the registry."""

from __future__ import annotations

from typing import Final

from dipgo_core.search.best_step_mask import search_step_masks
from dipgo_core.search.dipgo import search_gates
from dipgo_core.search.progress import SearchProblem, SearchProgress, Strategy

STRATEGIES: Final[dict[str, Strategy]] = {
    "dipgo": search_gates,
    "best_step_mask": search_step_masks,
}

__all__ = ["STRATEGIES", "SearchProblem", "SearchProgress", "Strategy"]
