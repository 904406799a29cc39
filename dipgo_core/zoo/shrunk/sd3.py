"""SD3 and SD3.5 medium, shrunk: all 24 blocks, width 8 for 1536; 64 pixels."""

from __future__ import annotations

from typing import Any, Final

from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from dipgo_core.zoo.shrunk.parts import (
    autoencoder,
    clip_text_encoder,
    clip_tokenizer,
    seeded,
    t5_encoder,
    t5_tokenizer,
)
from dipgo_core.zoo.shrunk.sd import LATENT_SIZE

CLIP_WIDTH: Final = 16  # of each CLIP; pooled both
T5_WIDTH: Final = 48  # wider than both CLIPs, whose states are padded to it
T5_TOKENS: Final = 512  # of the tokenizer; calls take 256


def build_sd3() -> StableDiffusion3Pipeline:
    """Return SD3 medium."""
    return _pipeline(pos_embed_max_size=192)


def build_sd35() -> StableDiffusion3Pipeline:
    """Return SD3.5 medium: two attentions in the first 13 blocks, queries and keys normalised."""
    return _pipeline(
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm"
    )


def _pipeline(**settings: Any) -> StableDiffusion3Pipeline:
    """Three text encoders: CLIP-L and CLIP-G, pooled and joined, and T5."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        num_layers=24,
        num_attention_heads=1,  # all tokens of three encoders make attention the dearest part
        attention_head_dim=8,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=8,
        pooled_projection_dim=2 * CLIP_WIDTH,
        **settings,
    )
    words, more_words, t5_words = clip_tokenizer(), clip_tokenizer(pad="!"), t5_tokenizer(T5_TOKENS)
    return StableDiffusion3Pipeline(
        transformer=seeded(transformer, 3),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(
            1,
            latent_channels=16,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
            force_upcast=True,
            sample_size=8 * LATENT_SIZE,
        ),
        text_encoder=clip_text_encoder(
            words, 2, width=CLIP_WIDTH, activation="quick_gelu", projected=True
        ),
        tokenizer=words,
        text_encoder_2=clip_text_encoder(
            more_words, 4, width=CLIP_WIDTH, activation="gelu", projected=True
        ),
        tokenizer_2=more_words,
        text_encoder_3=t5_encoder(t5_words, 5, width=T5_WIDTH),
        tokenizer_3=t5_words,
    )
