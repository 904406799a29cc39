"""How an autoencoder decodes: image by image, in tiles, with its activations computed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Ways to decode in less memory; by default none.

    slicing: one image of a batch at a time. checkpointing: with gradients, the decoder's blocks are
    computed again in the backward pass. Neither changes an image beyond rounding. tile: side in
    pixels of overlapping tiles that are blended (diffusers, ``AutoencoderKL.tiled_decode``), which
    does.
    """

    slicing: bool = False
    checkpointing: bool = False
    tile: int | None = None


def set_decoding(vae: Any, decoding: Decoding) -> None:
    """Make an autoencoder decode like this from now on."""
    vae.use_slicing = decoding.slicing
    if decoding.checkpointing != vae.is_gradient_checkpointing:
        switch = "enable" if decoding.checkpointing else "disable"
        getattr(vae, f"{switch}_gradient_checkpointing")()
    vae.use_tiling = decoding.tile is not None
    if decoding.tile is not None:
        vae.tile_sample_min_size = decoding.tile
        vae.tile_latent_min_size = decoding.tile // pixels_per_latent(vae.config)


def pixels_per_latent(autoencoder: Mapping[str, Any]) -> int:
    """Return how many pixels of an image one latent stands for, along a side.

    autoencoder: its config.
    """
    return int(2 ** (len(autoencoder["block_out_channels"]) - 1))
