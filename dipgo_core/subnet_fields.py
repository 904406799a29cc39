"""What each field of a SubNet file must be, so that every broken file has one clear error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from dipgo_core.errors import SubNetError
from dipgo_core.graph import Reuse

#: Whether a value will do, and what is said of one that does not.
Rule = tuple[Callable[[Any], bool], str]


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond all floats
        return False


def _are_numbers(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_custom(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and set(value) <= {"timesteps", "sigmas"}
        and all(map(_are_numbers, value.values()))
    )


def _are_blocks(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(block, Mapping) for block in value):
        return False
    pairs = [(block.get("name"), block.get("reuse")) for block in value]
    if pairs[:1] != [("", Reuse.SKIP)] or not all(isinstance(name, str) for name, _ in pairs):
        return False
    kinds = {reuse for _, reuse in pairs[1:] if isinstance(reuse, str)}
    texts = all(isinstance(reuse, str) for _, reuse in pairs)
    return (
        texts
        and kinds <= {Reuse.OUTPUT, Reuse.RESIDUAL}
        and len({name for name, _ in pairs}) == len(pairs)
    )


def _are_rows(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, str) and row and set(row) <= {"0", "1"} for row in value)
        and len(set(map(len, value))) == 1
    )


_TEXT: Final[Rule] = (lambda value: isinstance(value, str) and value != "", "a text")
_TEXT_OR_NULL: Final[Rule] = (lambda value: value is None or isinstance(value, str), "text or null")
_OBJECT: Final[Rule] = (lambda value: isinstance(value, Mapping), "an object")
_NUMBER: Final[Rule] = (_is_number, "a finite number")
_COUNT: Final[Rule] = (lambda value: _is_whole(value, 0), "a whole number from 0 on")
_STEPS: Final[Rule] = (lambda value: _is_whole(value, 1), "a whole number from 1 on")
_RATIO: Final[Rule] = (lambda value: _is_number(value) and 0 <= value <= 1, "from 0 to 1")

_REQUIRED: Final[dict[str, Rule]] = {
    "model": _OBJECT,
    "model.family": _TEXT,
    "model.id": _TEXT,
    "model.denoiser": _TEXT,
    "model.config": _OBJECT,
    "model.config_sha256": _TEXT,
    "sampler": _OBJECT,
    "sampler.scheduler": _TEXT,
    "sampler.config": _OBJECT,
    "sampler.config_sha256": _TEXT,
    "sampler.steps": _STEPS,
    "sampler.timesteps": (_are_numbers, "a list of numbers, one a row of keep"),
    "sampler.guidance_scale": _NUMBER,
    "granularity": _TEXT,
    "blocks": (
        _are_blocks,
        'a list of {"name", "reuse"}, the first {"name": "", "reuse": "skip"}, the others of '
        'different names and reuse "output" or "residual"',
    ),
    "keep": (_are_rows, "a list of strings of 0 and 1, all of one length"),
    "macs": _OBJECT,
    "macs.dense": _COUNT,
    "macs.kept": _COUNT,
    "macs.pruned_ratio": _RATIO,
    "macs.convention": _TEXT,
}
_OPTIONAL: Final[dict[str, Rule]] = {
    "model.revision": _TEXT_OR_NULL,
    "model.base": _TEXT_OR_NULL,
    "model.resolution": (
        lambda value: value is None or _is_whole(value, 1),
        "a whole number from 1 on, or null",
    ),
    "model.latent_side": _STEPS,
    "model.tokens": _COUNT,
    "sampler.custom": (_is_custom, 'an object with a list of numbers "timesteps" or "sigmas"'),
    "sampler.guidance_calls": _COUNT,
    "keep_sha256": _TEXT,
    "extrapolation": (lambda value: _is_number(value) and 0 < value <= 2, "above 0, at most 2"),
    "macs.paper": _OBJECT,
    "provenance": _OBJECT,
    "metrics": _OBJECT,
}
#: Of MACs in another convention, which are none or whole.
_COUNTED: Final[dict[str, Rule]] = {
    "macs.paper.dense": _COUNT,
    "macs.paper.kept": _COUNT,
    "macs.paper.pruned_ratio": _RATIO,
}
_MISSING: Final = object()


def check_fields(data: Mapping[str, Any], source: str) -> None:
    """Raise SubNetError, naming file, field and rule, unless every field is what it must be."""
    counted = _COUNTED if _value(data, "macs.paper") not in (_MISSING, {}) else {}
    for field, (holds, rule) in {**_REQUIRED, **_OPTIONAL, **counted}.items():
        value = _value(data, field)
        if value is _MISSING and field in _OPTIONAL:
            continue
        if value is _MISSING or not holds(value):
            got = "nothing: it is missing" if value is _MISSING else _shown(value)
            raise SubNetError(
                f"{source}: {field} must be {rule}, got {got}; the file was edited or truncated: "
                "export the SubNet again"
            )


def check_macs(data: Mapping[str, Any], source: str) -> None:
    """Raise SubNetError, naming both sides, where numbers of MACs contradict each other."""
    macs = data["macs"]
    for field, counted in (("macs", macs), ("macs.paper", macs.get("paper"))):
        said = _macs_say(counted, field)
        if said is not None:
            raise SubNetError(f"{source}: {said}; the file was edited: export the SubNet again")


def _macs_say(macs: Mapping[str, Any] | None, field: str) -> str | None:
    """Return what is wrong with the MACs of one convention, or None."""
    if not macs:
        return None
    dense, kept, ratio = (macs[name] for name in ("dense", "kept", "pruned_ratio"))
    shown = f"{_shown(kept)} of {_shown(dense)}"
    if not 0 < kept <= dense:
        return f"{field}.kept must be from 1 to {field}.dense, got {shown}"
    pruned = 1 - kept / dense
    if abs(pruned - ratio) > 1e-6 + 1 / dense:
        return f"{field}.pruned_ratio is {ratio}, but {shown} MACs are kept: {pruned:.6g} are not"
    return None


def _value(data: Mapping[str, Any], field: str) -> Any:
    value: Any = data
    for part in field.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _shown(value: Any, most: int = 60) -> str:
    text = "an endless number" if isinstance(value, int) and value > 10**30 else repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
