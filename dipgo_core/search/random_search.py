"""Strategy `random_search`: random tables within the budget, the best one by what they really do.

The draws are those of the baseline `random`: scores from a uniform distribution, turned into a
table as the scores of a gradient search are.
"""

from __future__ import annotations

from collections.abc import Iterator

from dipgo_core.baselines import random_gates
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.tables import Hunt, Steps, search_tables

#: Draws that give no new table, after which there seem to be no more.
PATIENCE = 1_000


def search_random(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Draw tables for every target; see `search_tables`."""
    yield from search_tables(problem, _steps)


def _steps(hunt: Hunt) -> Steps:
    space, problem = hunt.space, hunt.problem
    idle = 0
    while idle < PATIENCE:
        seed = int(hunt.rng.integers(2**31))
        gates = random_gates(space.graph, hunt.target, space.num_calls, seed, problem.convention)
        drawn = hunt.candidate(space.rows_of(gates))
        if drawn in hunt.tried:
            idle += 1
            continue
        if hunt.tried and not hunt.affords(drawn):
            break
        idle = 0
        hunt.run(drawn)
        yield
    return hunt.ranked()[0]
