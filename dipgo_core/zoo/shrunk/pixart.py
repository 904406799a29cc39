"""PixArt-alpha and -Sigma at 1024 pixels, shrunk: all 28 blocks, width 24 for 1152."""

from __future__ import annotations

from typing import Any, Final

from diffusers import (
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from dipgo_core.zoo.shrunk.parts import autoencoder, seeded, t5_encoder, t5_tokenizer

HEADS: Final = 2
HEAD_WIDTH: Final = 12  # a third of the width is that of each micro-condition
TEXT_WIDTH: Final = 16
TOKENS: Final = 512  # of the tokenizer; calls take 120 (alpha) and 300 (Sigma)


def build_pixart() -> PixArtAlphaPipeline:
    """Return PixArt-alpha: resolution and aspect ratio as micro-conditions, DPM-Solver++ 2M."""
    return PixArtAlphaPipeline(**_components(sigma=False))


def build_pixart_sigma() -> PixArtSigmaPipeline:
    """Return PixArt-Sigma: no micro-conditions, the autoencoder of SDXL's scale."""
    return PixArtSigmaPipeline(**_components(sigma=True))


def _components(*, sigma: bool) -> dict[str, Any]:
    """The size is that of the published models, for the pipeline reads from it what it passes on;
    images of any smaller one are asked for by `resolution`."""
    words = t5_tokenizer(TOKENS)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        caption_channels=TEXT_WIDTH,
        sample_size=128,
        interpolation_scale=2,
        use_additional_conditions=not sigma,
    )
    return {
        "tokenizer": words,
        "text_encoder": t5_encoder(words, 2, width=TEXT_WIDTH),
        "vae": autoencoder(1, sample_size=1024, scaling_factor=0.13025 if sigma else 0.18215),
        "transformer": seeded(transformer, 3),
        "scheduler": DPMSolverMultistepScheduler(
            beta_start=0.0001, beta_end=0.02, beta_schedule="linear"
        ),
    }
