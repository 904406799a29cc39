"""Facts of families and known models against diffusers itself, and against shrunk models."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch

from dipgo_core.captured import captured_inputs, example_call
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import ConfigError, TraceError, UnknownModelError
from dipgo_core.families import (
    FAMILIES,
    KNOWN_MODELS,
    NOISE_SCHEDULERS,
    Family,
    KnownModel,
    Meta,
    call_options,
    calls_of,
    family_of,
    family_of_pipeline,
    find_family,
    find_known,
    find_noise_scheduler,
    num_calls,
    steps_rule,
)
from dipgo_core.families.fallback import own_sampler
from dipgo_core.families.schedulers import SPACINGS
from dipgo_core.pipelines import tokens_of
from dipgo_core.zoo.shrunk import SHRUNK, build

AURA = ("AuraFlowPipeline", {"transformer": "AuraFlowTransformer2DModel", "vae": "AutoencoderKL"})


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_families_name_classes_of_diffusers(family: Family) -> None:
    denoiser = getattr(diffusers, family.denoiser)
    for name in family.pipelines:
        parameters = getattr(diffusers, name)._get_signature_types()
        assert denoiser in parameters[family.denoiser_attribute]
        assert family_of_pipeline(name) is family


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_families_say_what_the_stock_call_takes(family: Family) -> None:
    for name in family.pipelines[: family.searchable]:
        accepted = inspect.signature(getattr(diffusers, name).__call__).parameters
        assert set(family.call_options) | set(family.custom) <= set(accepted)
        assert ("prompt" in accepted) == (family.conditioning == "prompt")
        assert ("height" in accepted) == (family.size_multiple is not None)
        assert {"timesteps", "sigmas"} & set(accepted) == set(family.custom)
        assert ("max_sequence_length" in accepted) == ("sequence" in family.tokens)


def shape_of(value: Any) -> Any:
    """Shapes of tensors, as deep as they are nested; what is no tensor as it is."""
    if isinstance(value, Mapping):
        return {name: shape_of(inner) for name, inner in value.items()}
    return tuple(value.shape) if isinstance(value, Meta | torch.Tensor) else value


@pytest.mark.parametrize("name", SHRUNK)
def test_families_declare_what_the_stock_call_gives_its_denoiser(name: str) -> None:
    """Oracle: one call of the real pipeline, ended where the denoiser would run."""
    pipe = build(name)
    family = family_of_pipeline(type(pipe).__name__)
    denoiser = getattr(pipe, family.denoiser_attribute)
    side, tokens = family.latent_side(denoiser.config), tokens_of(pipe, family)
    declared = shape_of(family.inputs(denoiser.config, side, tokens))
    given = shape_of(captured_inputs(pipe, family.denoiser_attribute, example_call(pipe)))
    assert {**given, "timestep": (1,)} == {**given, **declared}  # of U-Nets a number without shape
    left_out = {given[argument] for argument in set(given) - set(declared) if given[argument]}
    assert not left_out


@pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.id)
def test_known_models_belong_to_a_family_and_are_found(known: KnownModel) -> None:
    family = find_family(known.family)
    assert known.sampler.scheduler in family.schedulers
    assert known.pipeline in ("", *family.pipelines)
    assert find_known(known.id) is known
    assert known.base == "" or find_known(known.base) is not None


def test_schnell_is_called_with_the_length_it_was_trained_with() -> None:
    options = call_options(FAMILIES["flux"], "black-forest-labs/FLUX.1-schnell")
    assert options == {"max_sequence_length": 256}
    assert call_options(FAMILIES["flux"], "black-forest-labs/FLUX.1-dev") == {}


# noise schedulers ---------------------------------------------------------------------------------

GRID = [
    (name, spacing)
    for name, known in NOISE_SCHEDULERS.items()
    for spacing in known.spacings or (None,)
]


def noise_scheduler(name: str, spacing: str | None) -> Any:
    known = NOISE_SCHEDULERS[name]
    followed = {} if spacing is None else {"timestep_spacing": spacing, "steps_offset": 1}
    return getattr(diffusers, known.cls)(**known.settings, **followed)


@pytest.mark.parametrize(("name", "spacing"), GRID)
def test_num_calls_is_what_the_scheduler_sets_or_a_rule_says_why(name: str, spacing: Any) -> None:
    """Oracle: the scheduler's own timesteps, for every number of steps up to 125 and some above."""
    for steps in (*range(1, 126), 201, 250, 333, 1000):
        if steps > NOISE_SCHEDULERS[name].max_steps:
            assert "at most" in (steps_rule(name, steps, spacing) or "")
            continue
        scheduler = noise_scheduler(name, spacing)
        scheduler.set_timesteps(steps)
        fits = len(scheduler.timesteps) == num_calls(name, steps)
        assert fits == (steps_rule(name, steps, spacing) is None), steps


@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_noise_schedulers_say_which_lists_and_spacings_they_take(name: str) -> None:
    known = NOISE_SCHEDULERS[name]
    accepted = inspect.signature(getattr(diffusers, known.cls).set_timesteps).parameters
    assert set(known.custom) <= set(accepted)
    for other in set(SPACINGS) - set(known.spacings):
        assert "does not follow" in (steps_rule(name, 4, other) or "")


@pytest.mark.parametrize(
    ("name", "lists"),
    [(name, {c: [0.9, 0.5]}) for name, known in NOISE_SCHEDULERS.items() for c in known.custom],
)
def test_calls_of_a_schedule_of_ones_own(name: str, lists: dict[str, Any]) -> None:
    """Oracle: the scheduler's own timesteps."""
    if "timesteps" in lists:
        lists = {"timesteps": [959, 499]}  # both among those that LCM is distilled for
    scheduler = noise_scheduler(name, None)
    scheduler.set_timesteps(**lists)
    sampler = SamplerSettings(scheduler=name, steps=2, guidance_scale=1.0, **lists)
    assert calls_of(sampler) == len(scheduler.timesteps)


def test_pndm_of_50_steps_has_51_calls() -> None:
    assert num_calls("pndm", 50) == 51


def test_sampler_settings_come_back_from_json() -> None:
    listed = SamplerSettings(scheduler="euler", steps=2, guidance_scale=1.0, timesteps=(9, 4))
    assert listed.to_json()["timesteps"] == [9, 4] and "sigmas" not in listed.to_json()
    assert SamplerSettings(**listed.to_json()) == listed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"timesteps": (9, 4, 1)}, "one entry a step: steps is 2, got 3"),
        ({"timesteps": (9, 4), "sigmas": (2.0, 1.0)}, "exclude each other"),
        ({"timesteps": (9, 4), "spacing": "leading"}, "exclude each other"),
    ],
)
def test_sampler_settings_refuse_what_does_not_go_together(fields: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplerSettings(scheduler="euler", steps=2, guidance_scale=1.0, **fields)


# names --------------------------------------------------------------------------------------------


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match=r"knows ddim, pndm.*Did you mean 'ddim'"):
        num_calls("dddim", 10)
    with pytest.raises(UnknownModelError, match=r"sd, sdxl, dit.*Did you mean 'sdxl'"):
        find_family("sdxxl")
    with pytest.raises(UnknownModelError, match="SanaPipeline.*supported are StableDiffusion"):
        family_of_pipeline("SanaPipeline")
    assert find_known("nobody/nothing") is None
    assert find_noise_scheduler("lcm").cls == "LCMScheduler"


def test_flux_refuses_sigmas_that_its_pipeline_would_drop() -> None:
    """Source: FluxPipeline.__call__ sets sigmas to None where use_flow_sigmas is set."""
    config, schedule = {"use_flow_sigmas": True}, FAMILIES["flux"].schedule
    plain = SamplerSettings(scheduler="flow_match_euler", steps=2, guidance_scale=1.0)
    assert schedule(config, 128, plain)["num_inference_steps"] == 2
    with pytest.raises(ConfigError, match="sigmas are dropped.*give steps"):
        schedule(config, 128, replace(plain, sigmas=(1.0, 0.4)))


@pytest.mark.parametrize(
    "known", [known for known in KNOWN_MODELS if known.family == "sd3"], ids=lambda known: known.id
)
def test_largest_images_of_sd3_are_what_its_positions_allow(known: KnownModel) -> None:
    """Oracle: diffusers' own cropping of the embedded positions."""
    embed = diffusers.SD3Transformer2DModel(
        num_layers=1,
        num_attention_heads=1,
        attention_head_dim=4,
        caption_projection_dim=4,
        pos_embed_max_size=known.config["pos_embed_max_size"],
    ).pos_embed
    largest = FAMILIES["sd3"].largest(known.config)
    assert largest is not None
    embed.cropped_pos_embed(largest // 8, largest // 8)
    with pytest.raises(ValueError, match="cannot be greater"):
        embed.cropped_pos_embed(largest // 8 + 2, largest // 8)


def test_a_pipeline_in_no_family_gets_one_that_its_name_gives_back() -> None:
    family = family_of(*AURA)
    assert family.name == "AuraFlowPipeline.transformer.AuraFlowTransformer2DModel"
    again = find_family(family.name)
    assert (again.denoiser_attribute, again.denoiser) == ("transformer", AURA[1]["transformer"])
    assert again.granularities == ("block",)
    with pytest.raises(ConfigError, match="give the model's `resolution`"):
        again.latent_side({})
    with pytest.raises(TraceError, match="a pipeline's call"):
        again.inputs({}, 8, 0)


def test_a_pipeline_of_a_family_keeps_it_and_one_without_denoiser_has_none() -> None:
    assert family_of("FluxPipeline", {"transformer": "anything"}) is FAMILIES["flux"]
    with pytest.raises(
        UnknownModelError, match="no family uses the pipeline class 'ShapEPipeline'"
    ):
        family_of("ShapEPipeline", {"prior": "PriorTransformer"})


def test_a_model_comes_with_a_sampler_if_its_noise_scheduler_has_a_name() -> None:
    sampler = own_sampler("EulerDiscreteScheduler")
    assert sampler is not None and sampler.scheduler == "euler"
    assert own_sampler("DEISMultistepScheduler") is None
