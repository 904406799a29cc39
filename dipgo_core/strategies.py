"""What each strategy is, as far as planning needs to know: plain names, no torch."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Final, Literal

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

#: The fields that decide measured errors, which all strategies share.
ERRORS_READ: Final = ("granularity", "seed", "samples", "staleness")

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
    read, plain = _read(settings), SearchSettings()
    unread = {f.name: getattr(plain, f.name) for f in fields(settings) if f.name not in read}
    return replace(settings, **unread)


def decisive(settings: SearchSettings) -> dict[str, Any]:
    """Return the fields that a strategy reads as JSON: what a search's content key holds of them.

    A field that is added for other strategies changes no key.
    """
    read = _read(settings)
    return {name: value for name, value in settings.to_json().items() if name in read}


def _read(settings: SearchSettings) -> frozenset[str]:
    return frozenset({"strategy", "granularity", *READS[settings.strategy]})
