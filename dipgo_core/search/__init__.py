"""Search strategies behind one signature; the registry."""

from __future__ import annotations

from typing import Final

from dipgo_core.search.anneal import search_annealed
from dipgo_core.search.auto import search_auto
from dipgo_core.search.best_step_mask import search_step_masks
from dipgo_core.search.calibrate import search_calibrated
from dipgo_core.search.dipgo import search_gates
from dipgo_core.search.dipgo_stepwise import search_gates_stepwise
from dipgo_core.search.errors import ErrorsProgress, ReuseErrors, measure_errors
from dipgo_core.search.genetic import search_genetic
from dipgo_core.search.progress import SearchProblem, SearchProgress, Strategy
from dipgo_core.search.random_search import search_random

STRATEGIES: Final[dict[str, Strategy]] = {
    "dipgo": search_gates,
    "dipgo_stepwise": search_gates_stepwise,
    "best_step_mask": search_step_masks,
    "calibrate": search_calibrated,
    "anneal": search_annealed,
    "genetic": search_genetic,
    "random_search": search_random,
    "auto": search_auto,
}

__all__ = [
    "STRATEGIES",
    "ErrorsProgress",
    "ReuseErrors",
    "SearchProblem",
    "SearchProgress",
    "Strategy",
    "measure_errors",
]
