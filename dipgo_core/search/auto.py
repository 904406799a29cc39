"""Strategy `auto`: candidates from several sources, refined and chosen by what they really do.

Seeds: the best step mask and evenly spread calls, with skipped calls that repeat or extrapolate;
what does best decides how calls are skipped. Then the least summed errors (`calibrate`), and, run
by run, the table of which a surrogate expects most, which learns from every run.
Last, the best few race on more and more calibration items, the step mask always among them: it is
given up only for a table that is better by more than the noise of the choice. So the result is
never worse than the best step mask, but by selection noise.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import numpy as np
import numpy.typing as npt

from dipgo_core.search.calibrate import calibrated
from dipgo_core.search.moves import anneal
from dipgo_core.search.objective import SMALLEST
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.surrogate import Surrogate
from dipgo_core.search.tables import Candidate, Hunt, Steps, search_tables

#: Moves of the annealing that proposes one candidate.
MOVES = 1_500
#: How skipped calls may predict: repeat, half the way along a straight line, all the way.
EXTRAPOLATIONS = (0.0, 0.5, 1.0)
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
    for seed in _seeds(hunt):
        if hunt.affords(seed) or not hunt.tried:
            hunt.run(seed)
            yield
    straight = hunt.ranked()[0].extrapolation  # how skips predict from now on
    surrogate = _surrogate(hunt, straight)
    if surrogate is not None:
        yield from _refine(hunt, surrogate, straight)
    return (yield from _race(hunt))


def _seeds(hunt: Hunt) -> list[Candidate]:
    """Return the best and the even step mask, with skips that repeat and that extrapolate."""
    wanted = EXTRAPOLATIONS if hunt.problem.settings.extrapolate else (0.0,)
    pairs = ((hunt.step_mask(share), hunt.uniform(share)) for share in wanted)
    return list(dict.fromkeys(seed for pair in pairs for seed in pair))


def _surrogate(hunt: Hunt, straight: float) -> Surrogate | None:
    """Return what is expected of tables whose skips extrapolate so, from measured errors and runs.

    Errors of skips were measured where they repeat; they count by as much less as the runs say.
    """
    if hunt.errors is None:
        return None
    plain, bent = (hunt.tried[hunt.step_mask(share)].score for share in (0.0, straight))
    covariances = hunt.errors.covariances.copy()
    ages = covariances.shape[1] // hunt.space.graph.num_blocks
    for block in {0, hunt.space.graph.skip_gate}:
        own = slice(block * ages, (block + 1) * ages)
        covariances[:, own] *= math.exp((bent - plain) / 2)
        covariances[:, :, own] *= math.exp((bent - plain) / 2)
    surrogate = Surrogate(covariances)
    for candidate, found in hunt.tried.items():
        if candidate.extrapolation == straight:
            surrogate.learn(hunt.space.reuses(candidate.rows), found.vectors)
    return surrogate


def _refine(hunt: Hunt, surrogate: Surrogate, straight: float) -> Generator[None]:
    """Run the tables of which most is expected, until what the race needs is left."""
    reserved = min(_race_cost(hunt), hunt.left / 2)
    proposals = [hunt.candidate(rows, straight) for rows in calibrated(hunt)[:2]]
    while hunt.left > reserved:
        candidate = proposals.pop() if proposals else _proposal(hunt, surrogate, straight)
        if candidate is None:
            return
        if candidate in hunt.tried:
            continue
        found = hunt.run(candidate)
        surrogate.learn(hunt.space.reuses(candidate.rows), found.vectors)
        yield


def _proposal(hunt: Hunt, surrogate: Surrogate, straight: float) -> Candidate | None:
    """Return the table of which most is expected, of those that are not all but known."""
    doubt = DOUBTS[len(hunt.tried) % len(DOUBTS)]
    start = next(one for one in hunt.ranked() if one.extrapolation == straight)
    ranked = anneal(
        lambda rows: surrogate.score(hunt.space.reuses(rows), doubt),
        hunt.space,
        hunt.budget,
        start.rows,
        MOVES,
        hunt.rng,
    )
    for _, rows in ranked:
        candidate = hunt.candidate(rows, straight)
        new = candidate not in hunt.tried
        if new and surrogate.novelty(hunt.space.reuses(rows)) > SAME:
            return candidate
    return None


def _race_cost(hunt: Hunt) -> float:
    """Return what a race costs where every round drops half, in dense runs of one image."""
    first, rounds = len(hunt.screened), int(math.log2(GROWTH))
    runs = sum((1 + max(1, (FINALISTS - 1) >> done)) * (first << done) for done in range(rounds))
    return runs * hunt.cost(hunt.step_mask())


def _race(hunt: Hunt) -> Steps:
    """Run the best tables on twice the items a round, as long as there is effort left.

    Tables that surely are not the best are dropped.
    """
    mask = hunt.step_mask()
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


def _distinct(hunt: Hunt, mask: Candidate) -> list[Candidate]:
    """Return the best tables but the mask, leaving out those that end like a better one."""
    found: list[Candidate] = []
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
    if len(differences) < 2:  # one image tells nothing of the noise
        return False
    noise = differences.std(ddof=1) / math.sqrt(len(differences))
    return bool(differences.mean() > MARGIN * noise) and bool(differences.mean() > 0)
