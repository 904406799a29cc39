"""DiT-XL/2 at 256 pixels, shrunk: all 28 blocks, width 16 for 1152; 64 pixels."""

from __future__ import annotations

from typing import Final

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from dipgo_core.zoo.shrunk.parts import autoencoder, seeded
from dipgo_core.zoo.shrunk.sd import LATENT_SIZE, SCALING

CLASSES: Final = 1000


def build_dit() -> DiTPipeline:
    """Return DiT: learned sigma, class labels with their names, a linear noise schedule."""
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        out_channels=8,  # twice those of the latents: the variance is learned
        num_layers=28,
        sample_size=LATENT_SIZE,
        num_embeds_ada_norm=CLASSES,
    )
    return DiTPipeline(
        transformer=seeded(transformer, 3),
        vae=autoencoder(1, sample_size=8 * LATENT_SIZE, scaling_factor=SCALING),
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False),
        id2label={label: f"thing {label}" for label in range(CLASSES)},
    )
