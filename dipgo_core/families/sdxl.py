"""Stable Diffusion XL: a U-Net, two text encoders, sizes among the conditions."""

from __future__ import annotations

from typing import Final

from dipgo_core.config import SamplerSettings
from dipgo_core.families.ays import SDXL_TIMESTEPS
from dipgo_core.families.family import Family, KnownModel
from dipgo_core.families.schedulers import DIFFUSION
from dipgo_core.families.scorers import TEXT_TO_IMAGE
from dipgo_core.families.sd import UNET_BLOCKS, UNET_LAYERS, unet_inputs

_SAMPLER: Final = SamplerSettings(scheduler="ddim", steps=50, guidance_scale=5.0)
_BASE: Final = "stabilityai/stable-diffusion-xl-base-1.0"
_CONFIG: Final = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

FAMILY: Final = Family(
    name="sdxl",
    pipelines=(
        "StableDiffusionXLPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
    ),
    denoiser_attribute="unet",
    denoiser="UNet2DConditionModel",
    blocks=UNET_BLOCKS,
    layers=UNET_LAYERS,
    inputs=unet_inputs,
    schedulers=DIFFUSION,
    conditional="last",
    ays=SDXL_TIMESTEPS,
    sampler=_SAMPLER,
    resolution=1024,
    scorers=TEXT_TO_IMAGE,
)

KNOWN_MODELS: Final = (
    KnownModel(
        id=_BASE,
        family="sdxl",
        config=_CONFIG,
        resolution=1024,
        num_blocks=8,
        num_layers=33,
        macs=3_380_618_199_040,
        macs_paper=2_988_660_490_240,
        cache_bytes=85_327_872,
        cache_bytes_layers=174_456_832,
        sampler=_SAMPLER,
        scorers=TEXT_TO_IMAGE,
    ),
    # Config from memory of the published one: SDXL's, and an embedding of the guidance scale.
    KnownModel(
        id="latent-consistency/lcm-sdxl",
        family="sdxl",
        config={**_CONFIG, "time_cond_proj_dim": 256},
        resolution=1024,
        num_blocks=8,
        num_layers=33,
        macs=3_380_618_280_960,
        macs_paper=2_988_660_572_160,
        cache_bytes=85_327_872,
        cache_bytes_layers=174_456_832,
        sampler=SamplerSettings(scheduler="lcm", steps=4, guidance_scale=8.0),
        scorers=TEXT_TO_IMAGE,
        base=_BASE,
        note="a U-Net in the pipeline of SDXL base; 4 to 8 steps",
    ),
)
