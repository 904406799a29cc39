"""Scoring networks of a worker, each loaded once."""

from __future__ import annotations

from functools import lru_cache

from dipgo_core.evaluation.evaluate import LOADERS, LoadedScorer, Scorers, check_scorers
from dipgo_core.evaluation.metrics import ROLES, Role
from dipgo_core.evaluation.scorers import Scorer
from orchestrator.task.loading import loading
from orchestrator.task.work import Work


def scorers_of(work: Work) -> Scorers:
    """Return the networks that a shard is scored by, by role.

    Raises:
        ModelFilesError: weights that are missing or broken.
        EvaluationError: a network is not the one that was planned with.
    """
    names = work.task.options["scorers"]
    planned = {role: Scorer.from_json(one) for role, one in work.task.inputs["scorers"].items()}
    scorers = {role: loaded_scorer(role, names[role], work.device) for role in planned}
    check_scorers(planned, scorers)
    return scorers


@lru_cache(maxsize=len(ROLES))
def loaded_scorer(role: Role, name: str, device: str) -> LoadedScorer:
    """Load the network of a role by the name it was planned with; kept from task to task."""
    with loading():
        return LOADERS[role](name, device=device)
