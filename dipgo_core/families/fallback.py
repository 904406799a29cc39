"""A family for a pipeline that is in none: what its denoiser keeps in module lists is gated.

Nothing is known of it but its classes, so what a call is like is told by one call of the pipeline
that ends where the denoiser would run (`dipgo_core.captured`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import ConfigError, TraceError
from dipgo_core.families.family import Config, Family
from dipgo_core.families.schedulers import NOISE_SCHEDULERS, short_name
from dipgo_core.families.scorers import TEXT_TO_IMAGE

#: Components that pipelines of diffusers hold their denoiser under.
ATTRIBUTES: Final = ("transformer", "unet")
_STEPS: Final = 20
_GUIDANCE: Final = 4.5


def fallback_family(pipeline: str, attribute: str, denoiser: str) -> Family:
    """Return the family of one pipeline class; its name says the three classes it follows from."""

    def latent_side(config: Config) -> int:
        side = config.get("sample_size")
        if not isinstance(side, int):
            raise ConfigError(
                f"{denoiser} does not say the size of its images: give the model's `resolution`"
            )
        return side

    return Family(
        name=f"{pipeline}.{attribute}.{denoiser}",
        pipelines=(pipeline,),
        denoiser_attribute=attribute,
        denoiser=denoiser,
        blocks=(),
        layers=(),
        tokens="none",
        inputs=_inputs,
        latent_side=latent_side,
        schedulers=tuple(NOISE_SCHEDULERS),
        sampler=_sampler("flow_match_euler"),
        resolution=1024,
        scorers=TEXT_TO_IMAGE,
    )


def _inputs(config: Config, side: int, tokens: int) -> Mapping[str, Any]:
    raise TraceError("nothing is known of what this denoiser is given; look at a pipeline's call")


def own_sampler(scheduler_class: str) -> SamplerSettings | None:
    """Return a sampler of the noise scheduler that a model comes with, if it has a short name."""
    name = short_name(scheduler_class)
    return None if name is None else _sampler(name)


def _sampler(scheduler: str) -> SamplerSettings:
    return SamplerSettings(scheduler=scheduler, steps=_STEPS, guidance_scale=_GUIDANCE)


def named_fallback(name: str) -> Family | None:
    """Return the family that `fallback_family` called so, or None for another name."""
    parts = name.split(".")
    return fallback_family(*parts) if len(parts) == 3 and all(parts) else None


def fallback_of(pipeline: str, components: Mapping[str, str]) -> Family | None:
    """Return the family of a pipeline with these components (name: class), if it has a denoiser."""
    found = next((name for name in ATTRIBUTES if name in components), None)
    return None if found is None else fallback_family(pipeline, found, components[found])
