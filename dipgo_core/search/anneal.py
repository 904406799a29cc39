"""Strategy `anneal`: simulated annealing over gate tables by what they really do.

Source: Kirkpatrick, Gelatt and Vecchi, "Optimization by Simulated Annealing", Science 220 (1983).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dipgo_core.search.moves import FIRST_TEMPERATURE, LAST_TEMPERATURE, changed
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.tables import Hunt, Steps, search_tables

#: A walk that finds no new table within the budget in so many moves has seen all around it.
PATIENCE = 1_000


def search_annealed(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Anneal from the better one of the seeds, for every target; see `search_tables`."""
    yield from search_tables(problem, _steps)


def _steps(hunt: Hunt) -> Steps:
    for seed in dict.fromkeys((hunt.step_mask(), hunt.uniform())):
        hunt.run(seed)
        yield
    here = hunt.ranked()[0]
    first, idle = hunt.left, 0
    while hunt.affords(here) and idle < PATIENCE:
        new = hunt.candidate(changed(here.rows, hunt.space, hunt.rng))
        if hunt.space.macs(new.rows) > hunt.budget or new in hunt.tried:
            idle += 1
            continue
        idle = 0
        heat = FIRST_TEMPERATURE * (hunt.left / first) ** 2 + LAST_TEMPERATURE
        worse = hunt.run(new).score - hunt.tried[here].score
        if worse < 0 or hunt.rng.random() < math.exp(-worse / heat):
            here = new
        yield
    return hunt.ranked()[0]
