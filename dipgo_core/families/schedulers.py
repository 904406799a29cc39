"""Noise schedulers by short name: their class, what they can be set to, how many calls they make.

What a class accepts is that of diffusers 0.42 (`set_timesteps` and the config of each).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np

from dipgo_core.config import SamplerSettings, Spacing
from dipgo_core.errors import ConfigError, nearest

Custom = Literal["timesteps", "sigmas"]
_TRAINED: Final = 1000  # timesteps that models are trained with
SPACINGS: Final[tuple[Spacing, ...]] = ("leading", "trailing", "linspace")


@dataclass(frozen=True, kw_only=True)
class NoiseScheduler:
    """A diffusers scheduler class and the settings that make it what its short name says.

    spacings: timestep spacings it follows; none where it has a schedule of its own. custom: the
    lists it takes instead of a number of steps. max_steps: of a run, unless a model's config says
    otherwise.
    """

    cls: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    spacings: tuple[Spacing, ...] = SPACINGS
    custom: tuple[Custom, ...] = ()
    max_steps: int = _TRAINED


NOISE_SCHEDULERS: Final[dict[str, NoiseScheduler]] = {
    "ddim": NoiseScheduler(cls="DDIMScheduler"),
    "pndm": NoiseScheduler(cls="PNDMScheduler", settings={"skip_prk_steps": True}),
    "dpm++2m": NoiseScheduler(
        cls="DPMSolverMultistepScheduler",
        settings={"algorithm_type": "dpmsolver++", "solver_order": 2},
        custom=("timesteps",),
    ),
    "unipc": NoiseScheduler(cls="UniPCMultistepScheduler"),
    # its sigmas would need one entry more than there are steps
    "euler": NoiseScheduler(cls="EulerDiscreteScheduler", custom=("timesteps",)),
    "heun": NoiseScheduler(cls="HeunDiscreteScheduler", custom=("timesteps",)),
    "lcm": NoiseScheduler(cls="LCMScheduler", spacings=(), custom=("timesteps",), max_steps=50),
    "flow_match_euler": NoiseScheduler(
        cls="FlowMatchEulerDiscreteScheduler", spacings=(), custom=("sigmas",)
    ),
}

#: For models that predict noise, or velocity by its variance-preserving definition.
DIFFUSION: Final = ("ddim", "pndm", "dpm++2m", "unipc", "euler", "heun", "lcm")
#: For pipelines that start from unscaled noise (Euler and Heun start from another scale) and give
#: the scheduler no generator (LCM would draw noise that no seed decides).
UNSCALED: Final = ("ddim", "pndm", "dpm++2m", "unipc")
#: For models trained by flow matching.
FLOW: Final = ("flow_match_euler",)


def find_noise_scheduler(name: str) -> NoiseScheduler:
    """Return a noise scheduler by short name.

    Raises:
        ConfigError: no such noise scheduler.
    """
    if name not in NOISE_SCHEDULERS:
        raise ConfigError(
            f"sampler.scheduler knows {', '.join(NOISE_SCHEDULERS)}, got {name!r}."
            f"{nearest(name, list(NOISE_SCHEDULERS))}"
        )
    return NOISE_SCHEDULERS[name]


def short_name(scheduler_class: str) -> str | None:
    """Return the short name of a diffusers scheduler class, None for one without."""
    names = (name for name, known in NOISE_SCHEDULERS.items() if known.cls == scheduler_class)
    return next(names, None)


def num_calls(scheduler: str, steps: int) -> int:
    """Return how often the denoiser is evaluated in a run of `steps` steps.

    PNDM evaluates its second timestep twice; Heun evaluates every step but the last twice.
    """
    find_noise_scheduler(scheduler)
    if scheduler == "pndm" and steps > 1:
        return steps + 1
    return 2 * steps - 1 if scheduler == "heun" else steps


def steps_rule(scheduler: str, steps: int, spacing: Spacing | None) -> str | None:
    """Return the rule that a run of so many steps breaks, or None.

    Trailing spacing rounds some numbers of steps up (diffusers counts down from 1000 in floating
    point numbers).
    """
    known = find_noise_scheduler(scheduler)
    if steps > known.max_steps:
        return f"{scheduler} takes at most {known.max_steps} steps"
    if spacing is not None and spacing not in known.spacings:
        fitting = ", ".join(known.spacings) or "none: leave it out"
        return f"{scheduler} does not follow the spacing {spacing}; it follows {fitting}"
    made = len(np.arange(_TRAINED, 0, -_TRAINED / steps)) if spacing == "trailing" else steps
    if made != steps:
        return f"trailing spacing makes {made} timesteps of {steps} steps; take one more or less"
    return None


def calls_of(sampler: SamplerSettings) -> int:
    """Return how often the denoiser is evaluated in a run of this sampler."""
    return num_calls(sampler.scheduler, sampler.steps)


def guided_share(sampler: SamplerSettings) -> float:
    """Return the work of a run over that of one with guidance at every call."""
    if sampler.guidance_calls is None:
        return 1.0
    calls = calls_of(sampler)
    return (calls + min(calls, sampler.guidance_calls)) / (2 * calls)


#: Gives the arguments a stock call hands to ``set_timesteps``, device aside: config of the noise
#: scheduler, side of the latents, sampler.
Schedule = Callable[[Mapping[str, Any], int, SamplerSettings], dict[str, Any]]


def plain_schedule(
    config: Mapping[str, Any], side: int, sampler: SamplerSettings
) -> dict[str, Any]:
    """Return the sampler's own list, else its number of steps."""
    return sampler.custom or {"num_inference_steps": sampler.steps}


def shift(config: Mapping[str, Any], tokens: int, most: float) -> float:
    """Return mu of a schedule that shifts with the number of image tokens, linearly.

    Source: ``calculate_shift`` of diffusers' FLUX and SD3 pipelines. most: mu at the most tokens
    where the config does not say.
    """
    base_tokens = config.get("base_image_seq_len", 256)
    most_tokens = config.get("max_image_seq_len", 4096)
    base = config.get("base_shift", 0.5)
    slope = (config.get("max_shift", most) - base) / (most_tokens - base_tokens)
    return float(base + slope * (tokens - base_tokens))
