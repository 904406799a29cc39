"""Stable Diffusion 3 and 3.5: a transformer over text and image streams, three text encoders.

The published repositories are gated: configs as several public copies of them agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.config import SamplerSettings
from dipgo_core.families.family import Config, Family, KnownModel, Meta
from dipgo_core.families.schedulers import FLOW, plain_schedule, shift
from dipgo_core.families.scorers import TEXT_TO_IMAGE

_PATCH: Final = 2
_LATENT: Final = 8  # pixels of an image's side that are one latent
_TOKENS: Final = 77 + 256  # CLIP and T5, side by side
_SAMPLER: Final = SamplerSettings(scheduler="flow_match_euler", steps=28, guidance_scale=7.0)
_MEDIUM: Final = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}


def _inputs(config: Config, side: int, tokens: int) -> Mapping[str, Any]:
    return {
        "hidden_states": Meta((1, config["in_channels"], side, side)),
        "encoder_hidden_states": Meta((1, tokens, config["joint_attention_dim"])),
        "pooled_projections": Meta((1, config["pooled_projection_dim"])),
        "timestep": Meta((1,)),
    }


def _largest(config: Config) -> int:
    return int(config["pos_embed_max_size"]) * _PATCH * _LATENT


def _schedule(config: Mapping[str, Any], side: int, sampler: SamplerSettings) -> dict[str, Any]:
    """As StableDiffusion3Pipeline has it: shifted by size where the noise scheduler asks for it."""
    shifted = config.get("use_dynamic_shifting")
    mu = {"mu": shift(config, (side // _PATCH) ** 2, most=1.16)} if shifted else {}
    return {**plain_schedule(config, side, sampler), **mu}


FAMILY: Final = Family(
    name="sd3",
    pipelines=(
        "StableDiffusion3Pipeline",
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
    ),
    denoiser_attribute="transformer",
    denoiser="SD3Transformer2DModel",
    blocks=("transformer_blocks.*",),
    layers=(
        "transformer_blocks.*.attn",
        "transformer_blocks.*.attn2",
        "transformer_blocks.*.ff",
        "transformer_blocks.*.ff_context",
    ),
    # the last block returns no text
    streams={"transformer_blocks.*": ("encoder_hidden_states", "hidden_states")},
    tokens="tokenizer+sequence",
    inputs=_inputs,
    size_multiple=16,
    largest=_largest,
    schedulers=FLOW,
    custom=("sigmas",),
    schedule=_schedule,
    conditional="last",
    sampler=_SAMPLER,
    resolution=1024,
    scorers=TEXT_TO_IMAGE,
)

KNOWN_MODELS: Final = (
    KnownModel(
        id="stabilityai/stable-diffusion-3-medium-diffusers",
        family="sd3",
        config={**_MEDIUM, "pos_embed_max_size": 192},
        tokens=_TOKENS,
        prediction_type="flow",
        resolution=1024,
        num_blocks=25,
        num_layers=72,
        macs=4_452_168_769_536,
        macs_paper=3_005_917_298_688,
        cache_bytes=326_042_624,
        cache_bytes_layers=652_583_936,
        sampler=_SAMPLER,
        scorers=TEXT_TO_IMAGE,
    ),
    KnownModel(
        id="stabilityai/stable-diffusion-3.5-medium",
        family="sd3",
        config={
            **_MEDIUM,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
        tokens=_TOKENS,
        prediction_type="flow",
        resolution=1024,
        num_blocks=25,
        num_layers=85,
        macs=5_624_786_853_888,
        macs_paper=3_508_520_484_864,
        cache_bytes=326_042_624,
        cache_bytes_layers=816_161_792,
        sampler=SamplerSettings(scheduler="flow_match_euler", steps=40, guidance_scale=4.5),
        scorers=TEXT_TO_IMAGE,
    ),
    KnownModel(
        id="stabilityai/stable-diffusion-3.5-large",
        family="sd3",
        config={
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        tokens=_TOKENS,
        prediction_type="flow",
        resolution=1024,
        num_blocks=39,
        num_layers=114,
        macs=15_560_557_453_824,
        macs_paper=11_934_885_363_712,
        cache_bytes=817_525_504,
        cache_bytes_layers=1_636_146_432,
        sampler=SamplerSettings(scheduler="flow_match_euler", steps=28, guidance_scale=3.5),
        scorers=TEXT_TO_IMAGE,
    ),
)
