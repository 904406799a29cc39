"""What each strategy is, as far as planning needs to know: plain names, no torch."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Final, Literal

from dipgo_core.config import SearchSettings

#: What a strategy can be given that was found before it: measured errors of single reuses, the best
#: step masks.
Need = Literal["errors", "step_masks"]

_GRADIENT: Final = (
    "loss",
    "steps",
    "seed",
    "batch_size",
    "accumulation",
    "learning_rate",
    "warmup_steps",
    "weight_decay",
    "encoder",
    "query_dim",
)
_CANDIDATES: Final = ("seed", "samples", "evaluations", "objective")

#: The fields each strategy reads, besides `strategy` and `granularity`.
READS: Final[dict[str, tuple[str, ...]]] = {
    "dipgo": _GRADIENT,
    "best_step_mask": ("seed", "batch_size"),
    "calibrate": ("seed", "samples", "objective", "staleness"),
    "anneal": _CANDIDATES,
    "genetic": _CANDIDATES,
    "random_search": _CANDIDATES,
    "auto": (*_CANDIDATES, "staleness"),
}

#: Strategies that search at a budget, so that a target is a search of its own.
TABLE_STRATEGIES: Final = frozenset({"calibrate", "anneal", "genetic", "random_search", "auto"})

#: What the strategies begin with.
NEEDS: Final[dict[str, frozenset[Need]]] = {
    "calibrate": frozenset({"errors"}),
    "anneal": frozenset({"step_masks"}),
    "genetic": frozenset({"step_masks"}),
    "random_search": frozenset(),
    "auto": frozenset({"errors", "step_masks"}),
}


def effective(settings: SearchSettings) -> SearchSettings:
    """Return the settings with all fields that their strategy does not read at their defaults.

    So that equal work has one content key.
    """
    read = {"strategy", "granularity", *READS[settings.strategy]}
    plain = SearchSettings()
    unread = {f.name: getattr(plain, f.name) for f in fields(settings) if f.name not in read}
    return replace(settings, **unread)
