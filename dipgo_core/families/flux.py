"""FLUX.1: text and image streams, first side by side, then joined in single-stream blocks.

At granularity `layer` a single-stream block is one layer: its attention and feed-forward run side
by side into one output projection, and what could be gated of the feed-forward alone are bare
linear modules, which adapters (LoRA) replace.

FLUX.1-dev is gated: its config as public copies of it have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import ConfigError
from dipgo_core.families.family import Config, Family, KnownModel, Meta
from dipgo_core.families.schedulers import FLOW, plain_schedule, shift
from dipgo_core.families.scorers import TEXT_TO_IMAGE

_STREAMS: Final = ("encoder_hidden_states", "hidden_states")
_SAMPLER: Final = SamplerSettings(scheduler="flow_match_euler", steps=28, guidance_scale=3.5)
_SIDE: Final = 128  # FluxPipeline.default_sample_size; the config does not say


def _inputs(config: Config, side: int, tokens: int) -> Mapping[str, Any]:
    patches = (side // 2) ** 2  # the pipeline packs two by two latents into one token
    inputs: dict[str, Any] = {
        "hidden_states": Meta((1, patches, config["in_channels"])),
        "encoder_hidden_states": Meta((1, tokens, config["joint_attention_dim"])),
        "pooled_projections": Meta((1, config["pooled_projection_dim"])),
        "timestep": Meta((1,)),
        "img_ids": Meta((patches, 3)),
        "txt_ids": Meta((tokens, 3)),
    }
    if config["guidance_embeds"]:
        inputs["guidance"] = Meta((1,))
    return inputs


def _schedule(config: Mapping[str, Any], side: int, sampler: SamplerSettings) -> dict[str, Any]:
    """As FluxPipeline has it: sigmas from 1 to 1 / steps unless the scheduler makes its own.

    Raises:
        ConfigError: the pipeline would drop the sampler's own sigmas.
    """
    mu = shift(config, (side // 2) ** 2, most=1.15)
    own = bool(config.get("use_flow_sigmas"))
    if own and sampler.sigmas is not None:
        raise ConfigError(
            "sampler.sigmas are dropped where the noise scheduler makes its own "
            "(use_flow_sigmas in its config): give steps"
        )
    if own or sampler.sigmas is not None:
        return {**plain_schedule(config, side, sampler), "mu": mu}
    return {"sigmas": np.linspace(1.0, 1 / sampler.steps, sampler.steps), "mu": mu}


def _latent_side(config: Config) -> int:
    return _SIDE


FAMILY: Final = Family(
    name="flux",
    pipelines=(
        "FluxPipeline",
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    denoiser_attribute="transformer",
    denoiser="FluxTransformer2DModel",
    blocks=("transformer_blocks.*", "single_transformer_blocks.*"),
    layers=(
        "transformer_blocks.*.attn",
        "transformer_blocks.*.ff",
        "transformer_blocks.*.ff_context",
        "single_transformer_blocks.*",
    ),
    streams={"transformer_blocks.*": _STREAMS, "single_transformer_blocks.*": _STREAMS},
    tokens="sequence",
    inputs=_inputs,
    latent_side=_latent_side,
    size_multiple=16,
    schedulers=FLOW,
    custom=("sigmas",),
    schedule=_schedule,
    sampler=_SAMPLER,
    resolution=1024,
    scorers=TEXT_TO_IMAGE,
)

KNOWN_MODELS: Final = (
    KnownModel(
        id="black-forest-labs/FLUX.1-dev",
        family="flux",
        config={"guidance_embeds": True},
        tokens=512,
        prediction_type="flow",
        resolution=1024,
        num_blocks=58,
        num_layers=96,
        macs=37_192_326_709_248,
        macs_paper=29_756_127_707_136,
        cache_bytes=1_614_282_752,
        cache_bytes_layers=2_152_202_240,
        sampler=_SAMPLER,
        scorers=TEXT_TO_IMAGE,
    ),
    KnownModel(
        id="black-forest-labs/FLUX.1-schnell",
        family="flux",
        config={},
        tokens=256,
        call_options={"max_sequence_length": 256},  # what it was trained with
        prediction_type="flow",
        resolution=1024,
        num_blocks=58,
        num_layers=96,
        macs=34_733_313_490_944,
        macs_paper=28_100_407_590_912,
        cache_bytes=1_524_629_504,
        cache_bytes_layers=2_032_664_576,
        sampler=SamplerSettings(scheduler="flow_match_euler", steps=4, guidance_scale=0.0),
        scorers=TEXT_TO_IMAGE,
    ),
)
