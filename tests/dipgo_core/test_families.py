"""Facts of families and known models against diffusers itself."""

from __future__ import annotations

import diffusers
import pytest

from dipgo_core.errors import ConfigError, UnknownModelError
from dipgo_core.families import (
    FAMILIES,
    KNOWN_MODELS,
    NOISE_SCHEDULERS,
    Family,
    KnownModel,
    family_of_pipeline,
    find_family,
    find_known,
    find_noise_scheduler,
    num_calls,
)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_families_name_classes_of_diffusers(family: Family) -> None:
    parameters = getattr(diffusers, family.pipeline)._get_signature_types()
    denoiser = getattr(diffusers, family.denoiser)
    assert denoiser in parameters[family.denoiser_attribute]
    assert family_of_pipeline(family.pipeline) is family


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.id)
def test_known_models_belong_to_a_family_and_are_found(known: KnownModel) -> None:
    find_family(known.family)
    find_noise_scheduler(known.sampler.scheduler)
    assert find_known(known.id) is known


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 25, 50])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_num_calls_is_what_the_scheduler_sets(name: str, steps: int) -> None:
    """Oracle: the scheduler's own timesteps, leading spacing as in SD-1.5."""
    known = NOISE_SCHEDULERS[name]
    spacing = {"timestep_spacing": "leading", "steps_offset": 1} if known.spacings else {}
    config = {**spacing, **known.settings}
    scheduler = getattr(diffusers, known.cls)(**config)
    scheduler.set_timesteps(steps)
    assert num_calls(name, steps) == len(scheduler.timesteps)


def test_pndm_of_50_steps_has_51_calls() -> None:
    assert num_calls("pndm", 50) == 51


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"knows ddim, pndm.*Did you mean 'ddim'"):
        num_calls("dddim", 10)
    with pytest.raises(UnknownModelError, match=r"sd, sdxl, dit.*Did you mean 'sdxl'"):
        find_family("sdxxl")
    with pytest.raises(UnknownModelError, match="SanaPipeline.*supported are StableDiffusion"):
        family_of_pipeline("SanaPipeline")
    assert find_known("nobody/nothing") is None
