"""Pipelines at full width with seeded weights: speed does not depend on what weights say.

Prompts are given as embeddings, latents are returned as they are: what is left is the denoising
loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.families import find_known
from dipgo_core.pipelines import LoadedModel, loaded_model

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
DIT = "facebook/DiT-XL-2-256"
FLUX = "black-forest-labs/FLUX.1-dev"

#: Weights are cut from one pool of numbers: a generator would take longer than the measurement.
POOL = 2**22
SPREAD = 0.03
SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
#: FLUX.1-dev has 19 + 38 blocks of 24 heads; this is what two cores can run.
FLUX_ON_CPU = {"num_layers": 4, "num_single_layers": 8, "num_attention_heads": 8}
FLUX_TEXT_TOKENS = 64


@dataclass(frozen=True, eq=False)
class Bench:
    """A model, its sampler, and the arguments of one pipeline call."""

    model: LoadedModel
    arguments: Mapping[str, Any]
    sampler: SamplerSettings

    @property
    def denoiser(self) -> nn.Module:
        return self.model.denoiser

    def call(self) -> Tensor:
        """Run the pipeline once and return its final latents."""
        generator = torch.Generator().manual_seed(0)
        return self.model.pipe(**self.arguments, generator=generator).images


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a model is built for. side: pixels; filled: False leaves the weights unwritten."""

    side: int
    batch: int = 1
    device: str = "cpu"
    dtype: str = "float32"
    filled: bool = True

    @property
    def latent(self) -> int:
        return self.side // 8


def sd15(size: Size, steps: int) -> Bench:
    """Stable Diffusion 1.5: DDIM, guidance 7.5."""
    unet = _built(
        diffusers.UNet2DConditionModel, {**_known(SD15), "sample_size": size.latent}, size
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=_small_decoder(size),
        text_encoder=None,
        tokenizer=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    sampler = SamplerSettings(scheduler="ddim", steps=steps, guidance_scale=7.5)
    prompts = _embeddings(size, ("prompt_embeds", "negative_prompt_embeds"), 77, 768)
    return _bench(SD15, pipe, sampler, size, **prompts)


def sdxl(size: Size, steps: int) -> Bench:
    """Stable Diffusion XL base: DDIM, guidance 5."""
    unet = _built(
        diffusers.UNet2DConditionModel, {**_known(SDXL), "sample_size": size.latent}, size
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=_small_decoder(size),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(**SCHEDULE),
        add_watermarker=False,
    )
    sampler = SamplerSettings(scheduler="ddim", steps=steps, guidance_scale=5.0)
    prompts = _embeddings(size, ("prompt_embeds", "negative_prompt_embeds"), 77, 2048)
    pooled = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return _bench(SDXL, pipe, sampler, size, **prompts, **_embeddings(size, pooled, 1280))


def dit(size: Size, steps: int) -> Bench:
    """DiT-XL/2: DDIM, guidance 4."""
    config = {**_known(DIT), "sample_size": size.latent}
    transformer = _built(diffusers.DiTTransformer2DModel, config, size)
    pipe = diffusers.DiTPipeline(
        transformer=transformer,
        vae=_small_decoder(size),
        scheduler=diffusers.DDIMScheduler(),
    )
    sampler = SamplerSettings(scheduler="ddim", steps=steps, guidance_scale=4.0)
    return _bench(DIT, pipe, sampler, size, class_labels=[1] * size.batch, output_type="pt")


def flux(size: Size, steps: int, cut: Mapping[str, Any]) -> Bench:
    """FLUX.1-dev, `cut` in depth and width: Euler on the flow, guidance distilled."""
    config = {"guidance_embeds": True, **cut}
    transformer = _built(diffusers.FluxTransformer2DModel, config, size)
    pipe = diffusers.FluxPipeline(
        vae=_small_decoder(size),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    sampler = SamplerSettings(scheduler="flow_match_euler", steps=steps, guidance_scale=3.5)
    texts = _embeddings(size, ("prompt_embeds",), FLUX_TEXT_TOKENS, 4096)
    pooled = _embeddings(size, ("pooled_prompt_embeds",), 768)
    return _bench(FLUX, pipe, sampler, size, height=size.side, width=size.side, **texts, **pooled)


def _small_decoder(size: Size) -> nn.Module:
    """Images are eight times as large as latents; next to nothing is computed for that."""
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=4,
    )
    return vae.to(size.device, getattr(torch, size.dtype))


def _bench(name: str, pipe: Any, sampler: SamplerSettings, size: Size, **arguments: Any) -> Bench:
    settings = ModelSettings(id=name, dtype=size.dtype, resolution=size.side)  # type: ignore[arg-type]
    model = loaded_model(pipe, settings, weights_sha256="0" * 64)
    steps = {"num_inference_steps": sampler.steps, "guidance_scale": sampler.guidance_scale}
    return Bench(model, {"output_type": "latent", **steps, **arguments}, sampler)


def _known(name: str) -> Mapping[str, Any]:
    known = find_known(name)
    assert known is not None
    return known.config


def _embeddings(size: Size, names: tuple[str, ...], *shape: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    place = {"device": size.device, "dtype": getattr(torch, size.dtype)}
    return {
        name: torch.randn(size.batch, *shape, generator=generator).to(**place) for name in names
    }


def _built(build: Callable[..., nn.Module], config: Mapping[str, Any], size: Size) -> nn.Module:
    """Build a denoiser without initialising it, then fill it from the pool."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # it advises on casts
    with torch.device("meta"):
        denoiser = build(**config).to(getattr(torch, size.dtype))
    denoiser = denoiser.to_empty(device=size.device)
    if size.filled:
        pool = torch.empty(POOL).uniform_(-SPREAD, SPREAD, generator=torch.manual_seed(0))
        for name, tensor in [*denoiser.named_parameters(), *denoiser.named_buffers()]:
            _fill(name, tensor.data, pool)
    return denoiser


def _fill(name: str, tensor: Tensor, pool: Tensor) -> None:
    if tensor.ndim < 2:
        tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        return
    for piece in tensor.view(-1).split(POOL):
        piece.copy_(pool[: piece.numel()])
