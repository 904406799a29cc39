"""SDXL base, shrunk: widths 8, 16, 32 for 320, 640, 1280; attention 1, 1, 2 deep for 1, 2, 10."""

from __future__ import annotations

from typing import Final

from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

from dipgo_core.zoo.shrunk.parts import autoencoder, clip_text_encoder, clip_tokenizer, seeded
from dipgo_core.zoo.shrunk.sd import SCHEDULE

LATENT_SIZE: Final = 8
TEXT_WIDTH: Final = 16  # of each encoder; attention sees both
SIZES: Final = 6  # of time_ids: original size, crop, target size
TIME_WIDTH: Final = 8


def build_sdxl() -> StableDiffusionXLPipeline:
    """Return SDXL: two text encoders, text_time embeddings, an autoencoder for float32."""
    words, more_words = clip_tokenizer(), clip_tokenizer(pad="!")
    return StableDiffusionXLPipeline(
        vae=autoencoder(1, sample_size=8 * LATENT_SIZE, scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip_text_encoder(words, 2, width=TEXT_WIDTH, activation="quick_gelu"),
        text_encoder_2=clip_text_encoder(
            more_words, 4, width=TEXT_WIDTH, activation="gelu", projected=True
        ),
        tokenizer=words,
        tokenizer_2=more_words,
        unet=seeded(_unet(), 3),
        scheduler=EulerDiscreteScheduler(
            beta_start=SCHEDULE["beta_start"],
            beta_end=SCHEDULE["beta_end"],
            beta_schedule=SCHEDULE["beta_schedule"],
            timestep_spacing="leading",
            steps_offset=SCHEDULE["steps_offset"],
        ),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(8, 16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=2 * TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_WIDTH,
        projection_class_embeddings_input_dim=SIZES * TIME_WIDTH + TEXT_WIDTH,
        norm_num_groups=4,
    )
