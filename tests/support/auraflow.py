"""AuraFlow built tiny: a pipeline in no family, whose denoiser has two lists of blocks."""

from __future__ import annotations

from typing import Any

import diffusers

from dipgo_core.zoo.shrunk.parts import autoencoder, seeded, t5_encoder, t5_tokenizer


def tiny_auraflow() -> Any:
    words = t5_tokenizer(256)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pos_embed_max_size=16,
    )
    return diffusers.AuraFlowPipeline(
        tokenizer=words,
        text_encoder=t5_encoder(words, 2, width=16),
        vae=autoencoder(1, sample_size=64),
        transformer=seeded(transformer, 3),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.73),
    )
