"""Strategy `calibrate`: the table with the least measured error of its reuses, no run of a table.

Errors of single reuses (`search.errors`) are added up, those of one call with the angles between
them; annealing over all tables within the budget finds the least sum. No forwards of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from dipgo_core.errors import SearchError
from dipgo_core.search.moves import anneal
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.reads import Rows
from dipgo_core.search.surrogate import Surrogate
from dipgo_core.search.tables import Hunt, Steps, search_tables

#: Moves of one annealing, and how often it is begun anew.
MOVES = 6_000
STARTS = 3


def search_calibrated(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Find the least summed error for every target; see `search_tables`."""
    yield from search_tables(problem, _steps)


def calibrated(hunt: Hunt) -> list[Rows]:
    """Return the tables with the least summed error, best first."""
    if hunt.errors is None:
        raise SearchError(
            f"strategy {hunt.problem.settings.strategy} needs measured errors: give the problem "
            "what dipgo_core.search.errors.measure_errors ends with"
        )
    surrogate = Surrogate(hunt.errors.covariances)
    found: dict[Rows, float] = {}
    for start in (hunt.step_mask(), *[hunt.uniform()] * (STARTS - 1)):
        for score, rows in anneal(
            lambda rows: surrogate.score(hunt.space.reuses(rows)),
            hunt.space,
            hunt.budget,
            start.rows,
            MOVES,
            hunt.rng,
        )[:20]:
            found[rows] = score
    return sorted(found, key=lambda rows: found[rows])


def _steps(hunt: Hunt) -> Steps:
    yield
    return hunt.candidate(calibrated(hunt)[0])
