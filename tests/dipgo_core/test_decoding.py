"""Ways to decode: what they change, and that all of them can be undone."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_vae
from torch import Tensor

from dipgo_core.decoding import Decoding, pixels_per_latent, set_decoding


def images(decoding: Decoding, latents: Tensor) -> Tensor:
    vae = tiny_vae().eval().requires_grad_(False)
    set_decoding(vae, decoding)
    decoded: Tensor = vae.decode(latents, return_dict=False)[0]
    return decoded


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def test_slicing_changes_no_image(latents: Tensor) -> None:
    whole, sliced = (images(Decoding(slicing=on), latents) for on in (False, True))
    assert torch.allclose(sliced, whole, atol=1e-5)


def test_tiles_change_images_and_keep_their_size(latents: Tensor) -> None:
    whole, tiled = (images(Decoding(tile=tile), latents) for tile in (None, 16))
    assert tiled.shape == whole.shape and not torch.allclose(tiled, whole, atol=1e-3)


def test_checkpointing_keeps_gradients(latents: Tensor) -> None:
    gradients = []
    for on in (False, True):
        leaf = latents.clone().requires_grad_(True)
        images(Decoding(checkpointing=on), leaf).square().mean().backward()
        gradients.append(leaf.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7)


def test_everything_can_be_undone() -> None:
    vae = tiny_vae()
    set_decoding(vae, Decoding(slicing=True, checkpointing=True, tile=8))
    assert vae.tile_latent_min_size * pixels_per_latent(vae.config) == 8
    set_decoding(vae, Decoding())
    assert not (vae.use_slicing or vae.use_tiling or vae.is_gradient_checkpointing)
