"""What each strategy is, as far as planning needs to know: plain names, no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final, Literal

from dipgo_core.config import Granularity, Objective, SearchSettings

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
    "start",
    "sampling",
)
_CANDIDATES: Final = ("seed", "samples", "effort", "objective")

#: The fields each strategy reads, besides `strategy` and `granularity`.
READS: Final[dict[str, tuple[str, ...]]] = {
    "dipgo": (*_GRADIENT, "encoder", "query_dim"),
    "dipgo_stepwise": (*_GRADIENT, "objective", "staleness"),
    "best_step_mask": ("seed", "batch_size"),
    "calibrate": ("seed", "objective", "staleness"),
    "anneal": _CANDIDATES,
    "genetic": _CANDIDATES,
    "random_search": _CANDIDATES,
    "auto": (*_CANDIDATES, "staleness", "extrapolate"),
}

#: Strategies that search at a budget, so that a target is a search of its own.
TABLE_STRATEGIES: Final = frozenset({"calibrate", "anneal", "genetic", "random_search", "auto"})

#: So many step masks are run for each number of computed calls.
TRIED_MASKS: Final = 20
#: Step masks are run on so many calibration images.
MASKED_ITEMS: Final = 8
#: Calls that are skipped alone, to tell how far a change at a call reaches.
PROBED_CALLS: Final = 6
#: Candidates are run on at most so many images at once.
MOST_AT_ONCE: Final = 16
#: Calibration images that the errors of reuses are measured on: these differ by orders of
#: magnitude, so two will do.
PROBED_ITEMS: Final = 2

#: Strategies whose tasks are one a target: these, and what finds step masks for it.
AT_TARGETS: Final = TABLE_STRATEGIES | {"best_step_mask"}

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


@dataclass(frozen=True, kw_only=True)
class ErrorsSettings:
    """What decides the measured errors of single reuses, which all strategies share."""

    granularity: Granularity = "block"
    objective: Objective = "pixel"
    staleness: int = 4

    @classmethod
    def of(cls, settings: SearchSettings) -> ErrorsSettings:
        """Return the part of a search's settings that its measured errors depend on."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def search(self) -> SearchSettings:
        """Return settings to measure them with; all others are at their defaults."""
        return SearchSettings(**self.to_json())


def mask_forwards(num_calls: int) -> float:
    """Return about how many forwards a search for step masks takes for each of its images.

    A dense run, the probes on some of its images, and masks whose first calls are often those of
    the one before.
    """
    return num_calls * (2 + TRIED_MASKS / 8)


def _read(settings: SearchSettings) -> frozenset[str]:
    return frozenset({"strategy", "granularity", *READS[settings.strategy]})
