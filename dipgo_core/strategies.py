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

#: Up to this many calls all 2^(T - 1) step masks are tried, at one denoiser forward a mask.
EXHAUSTIVE_CALLS: Final = 11
#: Candidates are run on at most so many images at once.
MOST_AT_ONCE: Final = 16
#: Calibration images that the errors of reuses are measured on: these differ by orders of
#: magnitude, so two will do.
PROBED_ITEMS: Final = 2

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
    seed: int = 0
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

    Of short runs all masks are tried, a forward each. Of longer ones masks grow call by call, and
    prefixes are shared: on a tiny U-Net 346 of 14 calls, 770 of 20, about T to the power of 2.25.
    """
    return float(2 ** (num_calls - 1) if num_calls <= EXHAUSTIVE_CALLS else num_calls**2.25)


def _read(settings: SearchSettings) -> frozenset[str]:
    return frozenset({"strategy", "granularity", *READS[settings.strategy]})
