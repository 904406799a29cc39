"""Samplers of the baselines that change the sampler alone, and which baselines a model lacks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from dipgo_core.baselines import equal_compute_calls, uniform_calls
from dipgo_core.config import SamplerSettings, Spacing
from dipgo_core.families import NOISE_SCHEDULERS, calls_of, find_family, num_calls, steps_rule
from dipgo_core.families.ays import resampled
from dipgo_core.graph import Reuse
from dipgo_core.postprocess import kept_share
from orchestrator.sweep_settings import Baseline, SweepModel

#: Of models that were distilled for it: other solvers and schedules are not theirs.
_DISTILLED: Final = "lcm"

#: What tells points of a baseline apart, and their sampler.
Variant = tuple[str | None, SamplerSettings]


def fewer_steps(model: SweepModel, baseline: Baseline, target: float) -> Iterator[Variant]:
    """Yield samplers of as few steps as still make the calls of equal compute."""
    own = model.sampler
    wanted = equal_compute_calls(target, calls_of(own))
    for scheduler in _solvers(model, baseline):
        if scheduler == own.scheduler and own.custom:
            yield "subset", _subset(own, wanted)
        followed = NOISE_SCHEDULERS[scheduler].spacings
        solver = replace(own, scheduler=scheduler)
        for spacing in (s for s in baseline.spacing if s in followed):
            named = spacing if scheduler == own.scheduler else f"{scheduler} {spacing}"
            yield named, _with_steps(solver, wanted, spacing)
        if not followed and not own.custom:
            yield None, _with_steps(solver, wanted, None)


def aligned_steps(model: SweepModel, baseline: Baseline, target: float) -> Iterator[Variant]:
    """Yield samplers that follow the family's Align-Your-Steps list, at equal compute."""
    family = find_family(model.family)
    if family.ays is None or "timesteps" not in family.custom:
        return
    if model.sampler.scheduler == _DISTILLED:
        return
    wanted = equal_compute_calls(target, calls_of(model.sampler))
    for scheduler in _solvers(model, baseline):
        steps = _fewest(scheduler, wanted, None)
        listed = resampled(family.ays, steps)
        if "timesteps" in NOISE_SCHEDULERS[scheduler].custom and listed is not None:
            sampler = SamplerSettings(
                scheduler=scheduler,
                steps=steps,
                guidance_scale=model.sampler.guidance_scale,
                timesteps=listed,
            )
            yield scheduler, sampler


def unguided_steps(model: SweepModel, target: float) -> SamplerSettings | None:
    """Return the sampler with guidance at as few first calls as equal compute leaves, None where a
    run without any guidance spends more, or guidance cannot be left out.

    A call without guidance costs half a call with it.
    """
    sampler, share = model.sampler, kept_share(target)
    possible = find_family(model.family).conditional is not None and sampler.guided
    if not possible or sampler.scheduler == _DISTILLED or 2 * share < 1:
        return None
    calls = calls_of(sampler)
    guided = math.ceil(calls * (2 * share - 1))
    return replace(sampler, guidance_calls=guided if guided < calls else None)


def absence(model: SweepModel, baseline: Baseline, target: float) -> str | None:
    """Return why a model has no point of a baseline at the compute of a target, None if it has."""
    if baseline.name == "few_steps":
        return None if any(fewer_steps(model, baseline, target)) else _no_spacing(model)
    if baseline.name == "ays":
        return None if any(aligned_steps(model, baseline, target)) else _no_list(model)
    if baseline.name == "deepcache":
        family = find_family(model.family)
        fits = family.reuse is Reuse.OUTPUT and "layer" in family.granularities
        return None if fits else f"DeepCache is for U-Nets, {model.family} is none"
    if baseline.name == "guidance_off":
        return None if unguided_steps(model, target) else _no_unguided(model, target)
    return None


def _no_spacing(model: SweepModel) -> str:
    return f"no solver of it that {model.family} has follows a spacing of it"


def _no_list(model: SweepModel) -> str:
    family, own = find_family(model.family), model.sampler.scheduler
    if family.ays is None:
        return f"diffusers ships no Align-Your-Steps list for {model.family}"
    if own == _DISTILLED:
        return "a distilled model has steps of its own"
    return "none of its solvers takes timesteps, or two of so many would be one"


def _no_unguided(model: SweepModel, target: float) -> str:
    if not model.sampler.guided:
        return f"there is no guidance at guidance_scale {model.sampler.guidance_scale:g}"
    if find_family(model.family).conditional is None or model.sampler.scheduler == _DISTILLED:
        return "its guidance is an input of the denoiser and costs nothing"
    return "a run without any guidance still spends more than half"


def _solvers(model: SweepModel, baseline: Baseline) -> tuple[str, ...]:
    """Return the noise schedulers of a baseline, each once, that fit the model."""
    own = model.sampler.scheduler
    fitting = () if own == _DISTILLED else find_family(model.family).schedulers
    named = (own if solver == "own" else solver for solver in baseline.solver)
    return tuple(dict.fromkeys(name for name in named if name == own or name in fitting))


def _fewest(scheduler: str, calls: int, spacing: Spacing | None) -> int:
    """Return as few steps as make so many calls, or more.

    These may be more than the sampler's own, where trailing spacing cannot make those; the most
    that a noise scheduler takes, it can.
    """
    return next(
        steps
        for steps in range(1, NOISE_SCHEDULERS[scheduler].max_steps + 1)
        if num_calls(scheduler, steps) >= calls and steps_rule(scheduler, steps, spacing) is None
    )


def _with_steps(sampler: SamplerSettings, calls: int, spacing: Spacing | None) -> SamplerSettings:
    """Return the same solver with as few steps as make so many calls, or more."""
    steps = _fewest(sampler.scheduler, calls, spacing)
    return replace(sampler, steps=steps, spacing=spacing, timesteps=None, sigmas=None)


def _subset(sampler: SamplerSettings, calls: int) -> SamplerSettings:
    """Return evenly spread entries of a schedule of one's own, the first among them."""
    steps = next(s for s in range(1, sampler.steps + 1) if num_calls(sampler.scheduler, s) >= calls)
    kept = uniform_calls(steps, sampler.steps)
    lists = {name: [values[i] for i in kept] for name, values in sampler.custom.items()}
    return SamplerSettings(**{**sampler.to_json(), "steps": steps, **lists})
