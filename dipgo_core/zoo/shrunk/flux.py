"""FLUX.1-dev, shrunk: width 8 for 3072, all 19 + 38 blocks or a few."""

from __future__ import annotations

from typing import Final

from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from dipgo_core.zoo.shrunk.parts import (
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
    t5_encoder,
    t5_tokenizer,
)

CLIP_WIDTH: Final = 16
T5_WIDTH: Final = 32
T5_TOKENS: Final = 512
LATENT_CHANNELS: Final = 16


def build_flux() -> FluxPipeline:
    """Return FLUX: guidance as an input, latents packed 2 by 2, time shifted by image size."""
    return _build(19, 38)


def build_flux_short() -> FluxPipeline:
    """Return FLUX with a fifth of its blocks."""
    return _build(4, 8)


def _build(double: int, single: int) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=4 * LATENT_CHANNELS,
        num_layers=double,
        num_single_layers=single,
        num_attention_heads=1,
        attention_head_dim=8,
        joint_attention_dim=T5_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    )
    words, t5_words = clip_tokenizer(), t5_tokenizer(T5_TOKENS)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=autoencoder(
            1,
            latent_channels=LATENT_CHANNELS,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=True,
            sample_size=1024,
        ),
        text_encoder=clip_text_encoder(words, 2, width=CLIP_WIDTH, activation="quick_gelu"),
        tokenizer=words,
        text_encoder_2=t5_encoder(t5_words, 4, width=T5_WIDTH),
        tokenizer_2=t5_words,
        transformer=seeded(transformer, 3),
    )
