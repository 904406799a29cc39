"""Strategy `genetic`: Optuna's genetic algorithm over gates, by what the tables really do.

A gene is a score in [0, 1]: the scores of all searched gates give a table within the budget, as
those of a gradient search do (random keys: Bean, ORSA Journal on Computing 6 (1994)). So no child
is above the budget. Algorithm: optuna's NSGAIISampler, here of one objective.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import optuna

from dipgo_core.postprocess import select_subnet
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.reads import Rows
from dipgo_core.search.tables import Candidate, Hunt, Steps, search_tables

#: Tables of a generation: a search can afford a few dozen runs.
POPULATION = 10
#: Children in a row that are no new table, after which the population has become one table.
PATIENCE = 200


def search_genetic(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Breed tables from the seeds and random ones, for every target; see `search_tables`."""
    yield from search_tables(problem, _steps)


def _steps(hunt: Hunt) -> Steps:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.NSGAIISampler(
        population_size=POPULATION, seed=int(hunt.rng.integers(2**31))
    )
    study = optuna.create_study(sampler=sampler)
    for seed in (hunt.step_mask(), hunt.uniform()):
        study.enqueue_trial(_genes_of(hunt, seed.rows), skip_if_exists=True)
    idle = 0
    while idle < PATIENCE:
        trial = study.ask()
        child = _table(hunt, trial)
        new = child not in hunt.tried
        if new and hunt.tried and not hunt.affords(child):
            break
        score = hunt.run(child).score
        study.tell(trial, score)
        idle = 0 if new else idle + 1
        if new:
            yield
    return hunt.ranked()[0]


def _names(hunt: Hunt) -> list[tuple[int, int, str]]:
    """Return call, block and name of every gene."""
    calls, blocks = range(1, hunt.space.num_calls), hunt.space.graph.searched
    return [(call, n, f"{call}:{n}") for call in calls for n in blocks]


def _genes_of(hunt: Hunt, rows: Rows) -> dict[str, float]:
    """Return scores that give a table again: high ones of what it keeps."""
    keep = hunt.space.table_of(rows).keep
    return {name: 0.9 if keep[call, n] else 0.1 for call, n, name in _names(hunt)}


def _table(hunt: Hunt, trial: optuna.Trial) -> Candidate:
    space = hunt.space
    scores = np.ones((space.num_calls, space.graph.num_blocks))
    for call, n, name in _names(hunt):
        scores[call, n] = trial.suggest_float(name, 0.0, 1.0)
    convention = hunt.problem.convention
    gates = select_subnet(scores, space.graph, hunt.target, convention=convention)
    return hunt.candidate(space.rows_of(gates))
