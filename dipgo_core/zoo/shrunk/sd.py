"""Stable Diffusion 1.5 and 2.1, shrunk: widths 8 to 32 for 320 to 1280; 64 pixels."""

from __future__ import annotations

from typing import Any, Final

from diffusers import (
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

from dipgo_core.zoo.shrunk.parts import autoencoder, clip_text_encoder, clip_tokenizer, seeded

WIDTHS: Final = (8, 16, 32, 32)
TEXT_WIDTH: Final = 16
LATENT_SIZE: Final = 8
SCALING: Final = 0.18215

#: The noise schedule of both.
SCHEDULE: Final[dict[str, Any]] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_sd15() -> StableDiffusionPipeline:
    """Return SD-1.5: eight heads at every level, 1x1 convolutions around attention, PNDM."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=WIDTHS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    scheduler = PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
    return _pipeline(unet, scheduler, activation="quick_gelu")


def build_sd21() -> StableDiffusionPipeline:
    """Return SD-2.1: v-prediction, linear projections, attention upcast, more heads deeper."""
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=WIDTHS,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 8, 8),
        use_linear_projection=True,
        upcast_attention=True,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, **SCHEDULE)
    return _pipeline(unet, scheduler, activation="gelu", pad="!")


def _pipeline(
    unet: UNet2DConditionModel, scheduler: Any, *, activation: str, **tokenizer: str
) -> StableDiffusionPipeline:
    words = clip_tokenizer(**tokenizer)
    return StableDiffusionPipeline(
        vae=autoencoder(1, sample_size=8 * LATENT_SIZE, scaling_factor=SCALING),
        text_encoder=clip_text_encoder(words, 2, width=TEXT_WIDTH, activation=activation),
        tokenizer=words,
        unet=seeded(unet, 3),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
