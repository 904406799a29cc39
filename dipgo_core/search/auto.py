"""Strategy `auto`: candidates from several sources, refined and chosen by what they really do.

Seeds: the best step mask, evenly spread calls, the least summed error (`calibrate`). Then, run by
run, the table of which a surrogate expects most (`search.surrogate`), which learns from every run.
Last, the best few race on more and more calibration items, the step mask always among them: it is
given up only for a table that is better by more than the noise of the choice. So the result is
never worse than the best step mask, but by selection noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dipgo_core.search.calibrate import calibrated
from dipgo_core.search.moves import anneal
from dipgo_core.search.objective import SMALLEST
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.reads import Rows
from dipgo_core.search.surrogate import Surrogate
from dipgo_core.search.tables import Hunt, Steps, search_tables

#: Moves of the annealing that proposes one candidate.
MOVES = 1_500
#: Proposals take turns in how much what is unknown counts against a table.
DOUBTS = (1.0, 0.25)
#: Tables whose errors differ by less than this share are one candidate.
SAME = 0.02
#: Tables that race, the step mask among them.
FINALISTS = 5
#: The last round of the race is run on so many times the items of the first.
GROWTH = 8
#: In standard errors: by how much a table must beat the step mask.
MARGIN = 2.0


def search_auto(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Search every target; see `search_tables`."""
    yield from search_tables(problem, _steps)


def _steps(hunt: Hunt) -> Steps:
    surrogate = Surrogate(hunt.errors.covariances) if hunt.errors is not None else None
    for rows in _first(hunt):
        _run(hunt, rows, surrogate)
        yield
    reserved = min(_race_cost(hunt), hunt.left / 2)
    while surrogate is not None and hunt.left > reserved:
        proposal = _proposal(hunt, surrogate)
        if proposal is None:
            break
        _run(hunt, proposal, surrogate)
        yield
    return (yield from _race(hunt))


def _first(hunt: Hunt) -> list[Rows]:
    """Return the seeds, each once."""
    sources = [hunt.step_mask(), hunt.uniform()]
    sources += calibrated(hunt)[:2] if hunt.errors is not None else []
    return list(dict.fromkeys(hunt.space.close(rows) for rows in sources))


def _run(hunt: Hunt, rows: Rows, surrogate: Surrogate | None) -> None:
    found = hunt.run(rows)
    if surrogate is not None:
        surrogate.learn(hunt.space.reuses(hunt.space.close(rows)), found.vectors)


def _proposal(hunt: Hunt, surrogate: Surrogate) -> Rows | None:
    """Return the table of which most is to be expected, of those that are not all but known."""
    doubt = DOUBTS[len(hunt.tried) % len(DOUBTS)]
    ranked = anneal(
        lambda rows: surrogate.score(hunt.space.reuses(rows), doubt),
        hunt.space,
        hunt.budget,
        hunt.ranked()[0],
        MOVES,
        hunt.rng,
    )
    novel = (
        rows
        for _, rows in ranked
        if hunt.is_new(rows) and surrogate.novelty(hunt.space.reuses(rows)) > SAME
    )
    return next(novel, None)


def _race_cost(hunt: Hunt) -> float:
    """Return what a race costs where every round drops half, in dense runs of one image."""
    first, rounds = len(hunt.screened), int(math.log2(GROWTH))
    runs = sum((1 + max(1, (FINALISTS - 1) >> done)) * (first << done) for done in range(rounds))
    return runs * hunt.cost(hunt.step_mask())


def _race(hunt: Hunt) -> Steps:
    """Run the best tables on twice the items a round, as long as there is effort left.

    Tables that surely are not the best are dropped.
    """
    mask = hunt.space.close(hunt.step_mask())
    racing = _distinct(hunt, mask)
    images = len(hunt.screened)
    most = min(len(hunt.items), GROWTH * images)
    logs = {rows: hunt.tried[rows].logs for rows in [mask, *racing]}
    while images < most:
        more = min(2 * images, most) - images
        costs = np.cumsum([hunt.cost(rows) for rows in [mask, *racing]])[1:] * more
        affordable = int((costs <= hunt.left).sum())
        if not affordable:
            break
        images, racing = images + more, racing[:affordable]
        logs = {rows: hunt.measure(rows, images).logs for rows in [mask, *racing]}
        yield
        racing.sort(key=lambda rows: float(logs[rows].mean()))
        racing = [rows for rows in racing if not _is_worse(logs[rows], logs[racing[0]])]
    winners = [rows for rows in racing if _is_worse(logs[mask], logs[rows])]
    return winners[0] if winners else mask


def _distinct(hunt: Hunt, mask: Rows) -> list[Rows]:
    """Return the best tables but the mask, leaving out those that end like a better one."""
    found: list[Rows] = []
    for rows in hunt.ranked():
        vectors = hunt.tried[rows].vectors
        others = (hunt.tried[other].vectors for other in [mask, *found])
        if all(_share(vectors, other) > SAME for other in others):
            found.append(rows)
    return found[: FINALISTS - 1]


def _share(vectors: npt.NDArray[np.float32], others: npt.NDArray[np.float32]) -> float:
    """Return how far two tables' errors differ, as a share of the first one's."""
    apart, own = np.square(vectors - others).sum(), np.square(vectors).sum()
    return float(apart / max(float(own), SMALLEST))


def _is_worse(logs: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> bool:
    """Return whether errors are larger by more than MARGIN standard errors of their differences."""
    differences = logs - others
    noise = differences.std(ddof=1) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
    return bool(differences.mean() > MARGIN * noise) and bool(differences.mean() > 0)
