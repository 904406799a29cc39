"""Families and known models: literal facts that planning needs before any weights are loaded.

Adding a family is one file here and its name in `_MODULES`. The file holds FAMILY, a `Family`: the
pipeline and denoiser classes of diffusers, which modules are gated at either granularity, the
streams of blocks that pass them on, the arguments of one denoiser call, defaults; and KNOWN_MODELS,
the facts of its published models. ``tests/dipgo_core/test_macs.py`` prints what a trace of
a known model counts wherever its literals differ. How prompts become inputs needs no code: the
stock pipeline does it. A pipeline in no family gets one of its denoiser's module lists
(`family_of`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.errors import UnknownModelError, nearest
from dipgo_core.families import dit, flux, pixart, sd, sd3, sdxl
from dipgo_core.families.fallback import fallback_of, named_fallback
from dipgo_core.families.family import (
    Conditioning,
    Config,
    Family,
    KnownModel,
    Meta,
    Scorers,
)
from dipgo_core.families.schedulers import (
    NOISE_SCHEDULERS,
    NoiseScheduler,
    calls_of,
    find_noise_scheduler,
    guided_share,
    num_calls,
    short_name,
    steps_rule,
)

__all__ = [
    "FAMILIES",
    "KNOWN_MODELS",
    "NOISE_SCHEDULERS",
    "Conditioning",
    "Config",
    "Family",
    "KnownModel",
    "Meta",
    "NoiseScheduler",
    "Scorers",
    "call_options",
    "calls_of",
    "family_of",
    "family_of_pipeline",
    "find_family",
    "find_known",
    "find_noise_scheduler",
    "guided_share",
    "num_calls",
    "short_name",
    "steps_rule",
]

_MODULES: Final = (sd, sdxl, dit, pixart, sd3, flux)

FAMILIES: Final[dict[str, Family]] = {module.FAMILY.name: module.FAMILY for module in _MODULES}
KNOWN_MODELS: Final[tuple[KnownModel, ...]] = tuple(
    known for module in _MODULES for known in module.KNOWN_MODELS
)


def find_known(model_id: str) -> KnownModel | None:
    """Return the facts of a known model, or None for a folder or an unknown hub id."""
    return next((known for known in KNOWN_MODELS if known.id == model_id), None)


def find_family(name: str) -> Family:
    """Return a family by name; ``Pipeline.component.Denoiser`` names one made from three classes.

    Raises:
        UnknownModelError: no such family.
    """
    family = FAMILIES.get(name) or named_fallback(name)
    if family is None:
        raise UnknownModelError(
            f"no family is called {name!r}; the families are {', '.join(FAMILIES)}."
            f"{nearest(name, list(FAMILIES))}"
        )
    return family


def family_of(pipeline: str, components: Mapping[str, str]) -> Family:
    """Return the family of a pipeline class, else one made for it.

    components: class names of the pipeline's networks.

    Raises:
        UnknownModelError: no family uses this pipeline class, and it has no denoiser to gate.
    """
    try:
        return family_of_pipeline(pipeline)
    except UnknownModelError:
        family = fallback_of(pipeline, components)
        if family is None:
            raise
        return family


def family_of_pipeline(pipeline: str) -> Family:
    """Return the family of a pipeline class name (``_class_name`` in model_index.json).

    Raises:
        UnknownModelError: no family uses this pipeline class.
    """
    for family in FAMILIES.values():
        if pipeline in family.pipelines:
            return family
    valid = [name for family in FAMILIES.values() for name in family.pipelines]
    raise UnknownModelError(
        f"no family uses the pipeline class {pipeline!r}; supported are {', '.join(valid)}."
        f"{nearest(pipeline, valid)}"
    )


def call_options(family: Family, model_id: str) -> dict[str, Any]:
    """Return what a stock call of this model is given beside prompt, sampler and size."""
    known = find_known(model_id)
    return {**family.call_options, **(known.call_options if known else {})}
