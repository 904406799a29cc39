"""Scoring networks of a worker, each loaded once."""

from __future__ import annotations

from functools import lru_cache

from dipgo_core.evaluation.evaluate import LOADERS, LoadedScorer, Scorers, check_scorers
from dipgo_core.evaluation.metrics import ROLES, Role
from orchestrator.task.work import Work


def scorers_of(work: Work) -> Scorers:
    """Return the networks that the task's protocol asks for, by role.

    Raises:
        ModelFilesError: weights that are missing or broken.
        EvaluationError: a network is not the one in the protocol.
    """
    names = work.task.options["scorers"]
    scorers = {
        role: loaded_scorer(role, names[role], work.device)
        for role in work.protocol.scorers
        if role in names
    }
    check_scorers(work.protocol, scorers)
    return scorers


@lru_cache(maxsize=len(ROLES))
def loaded_scorer(role: Role, name: str, device: str) -> LoadedScorer:
    """Load the network of a role by the name it was planned with; kept from task to task."""
    return LOADERS[role](name, device=device)
