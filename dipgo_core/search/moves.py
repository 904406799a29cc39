"""Random changes of a gate table, and annealing by them within a budget. Pure, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from dipgo_core.search.reads import Rows, TableSpace

#: Annealing begins where a change of the score by this much is taken as likely as not.
FIRST_TEMPERATURE = 0.5
LAST_TEMPERATURE = 1e-3


def changed(rows: Rows, space: TableSpace, rng: np.random.Generator) -> Rows:
    """Return the table with one to three calls changed: skipped, computed, made like another call,
    or one of their gates turned over.  The first call stays whole.
    """
    whole, width = (1 << space.graph.num_blocks) - 1, space.graph.num_blocks
    implied = 0 if 0 in space.graph.searched else 1
    new = list(rows)
    for _ in range(int(rng.integers(1, 4))):
        call, kind = int(rng.integers(1, len(rows))), rng.random()
        if kind < 0.25:
            new[call] = 0
        elif kind < 0.45:
            new[call] = whole
        elif kind < 0.6:
            new[call] = new[int(rng.integers(0, len(rows)))]
        else:
            start = new[call] if new[call] else whole
            new[call] = (start ^ 1 << int(rng.integers(1, width))) | implied | 1
    return tuple(new)


def anneal(
    score: Callable[[Rows], float],
    space: TableSpace,
    budget: int,
    start: Rows,
    moves: int,
    rng: np.random.Generator,
) -> list[tuple[float, Rows]]:
    """Return the tables that annealing went through, best first, in canonical form.

    Only tables within `budget` MACs are scored; a colder and colder walk takes worse ones ever
    less likely (Kirkpatrick et al. 1983).
    """
    here = space.close(start)
    value = score(here)
    seen = {here: value}
    for move in range(moves):
        heat = FIRST_TEMPERATURE * (1 - move / moves) ** 2 + LAST_TEMPERATURE
        new = space.close(changed(here, space, rng))
        if space.macs(new) > budget:
            continue
        found = seen.get(new)
        if found is None:
            found = seen[new] = score(new)
        if found < value or rng.random() < math.exp((value - found) / heat):
            here, value = new, found
    return sorted((value, rows) for rows, value in seen.items())
