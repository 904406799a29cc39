"""PixArt-alpha and PixArt-Sigma: a transformer with cross-attention to T5.

Configs as public copies have them; the MACs of PixArt-alpha are those measured for the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.config import SamplerSettings
from dipgo_core.families.family import Config, Family, KnownModel, Meta
from dipgo_core.families.schedulers import DIFFUSION
from dipgo_core.families.scorers import TEXT_TO_IMAGE

_SAMPLER: Final = SamplerSettings(scheduler="dpm++2m", steps=20, guidance_scale=4.5)
_BIG: Final = (
    128  # latents of this side have their size among the conditions, unless said otherwise
)


def _inputs(config: Config, side: int, tokens: int) -> Mapping[str, Any]:
    sized = config["use_additional_conditions"]
    if sized is None:
        sized = config["sample_size"] == _BIG
    sizes = {"resolution": Meta((1, 2)), "aspect_ratio": Meta((1, 1))}
    return {
        "hidden_states": Meta((1, config["in_channels"], side, side)),
        "encoder_hidden_states": Meta((1, tokens, config["caption_channels"])),
        "encoder_attention_mask": Meta((1, tokens), "int64"),
        "timestep": Meta((1,)),
        "added_cond_kwargs": sizes if sized else dict.fromkeys(sizes),
    }


FAMILY: Final = Family(
    name="pixart",
    pipelines=("PixArtAlphaPipeline", "PixArtSigmaPipeline"),
    searchable=2,
    denoiser_attribute="transformer",
    denoiser="PixArtTransformer2DModel",
    blocks=("transformer_blocks.*",),
    layers=("transformer_blocks.*.attn1", "transformer_blocks.*.attn2", "transformer_blocks.*.ff"),
    streams={"transformer_blocks.*": ("hidden_states",)},
    tokens="sequence",
    # prompts as they are given, and images of the size that was asked for
    call_options={"clean_caption": False, "use_resolution_binning": False},
    inputs=_inputs,
    size_multiple=16,
    schedulers=DIFFUSION,
    conditional="last",
    sampler=_SAMPLER,
    resolution=1024,
    scorers=TEXT_TO_IMAGE,
)

KNOWN_MODELS: Final = (
    KnownModel(
        id="PixArt-alpha/PixArt-XL-2-1024-MS",
        family="pixart",
        config={"caption_channels": 4096},
        tokens=120,
        resolution=1024,
        num_blocks=29,
        num_layers=85,
        macs=3_254_761_783_296,
        macs_paper=2_140_721_086_464,
        cache_bytes=264_503_296,
        cache_bytes_layers=792_985_600,
        sampler=_SAMPLER,
        scorers=TEXT_TO_IMAGE,
    ),
    KnownModel(
        id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
        family="pixart",
        pipeline="PixArtSigmaPipeline",
        config={
            "caption_channels": 4096,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
        },
        tokens=300,
        resolution=1024,
        num_blocks=29,
        num_layers=85,
        macs=3_316_789_886_976,
        macs_paper=2_155_185_782_784,
        cache_bytes=264_503_296,
        cache_bytes_layers=792_985_600,
        sampler=_SAMPLER,
        scorers=TEXT_TO_IMAGE,
    ),
)
