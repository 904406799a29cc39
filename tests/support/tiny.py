"""Tiny seeded pipelines built from configs: real diffusers classes, random weights, no files."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.pipelines import LoadedModel, loaded_model
from dipgo_core.runtime import gated_calls
from dipgo_core.sampling import Batch, rollout

WORDS = ("a", "red", "blue", "cat", "dog", "on", "the", "moon")
DDIM = SamplerSettings(scheduler="ddim", steps=6, guidance_scale=4.0)


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows WORDS."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    letters = sorted(set("".join(WORDS)))
    tokens = [*special, *letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            if (parts[0], parts[1]) not in merges:
                merges.append((parts[0], parts[1]))
            parts[:2] = [parts[0] + parts[1]]
            tokens.append(parts[0])
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=8)


def tiny_scheduler(**settings: Any) -> diffusers.DDIMScheduler:
    """SD-1.5's noise schedule."""
    config = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    }
    return diffusers.DDIMScheduler(**{**config, **settings})


def tiny_unet(**settings: Any) -> diffusers.UNet2DConditionModel:
    """SD-1.5's topology, one resnet a block, 16 to 32 channels."""
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "block_out_channels": (16, 16, 32, 32),
        "layers_per_block": 1,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "norm_num_groups": 8,
    }
    return diffusers.UNet2DConditionModel(**{**config, **settings})


def tiny_transformer(**settings: Any) -> diffusers.DiTTransformer2DModel:
    """Four DiT blocks, with learned sigma."""
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 4,
        "out_channels": 8,
        "num_layers": 4,
        "sample_size": 8,
    }
    return diffusers.DiTTransformer2DModel(**{**config, **settings})


def tiny_vae(**settings: Any) -> diffusers.AutoencoderKL:
    """Four latent channels, half resolution."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        sample_size=16,
        **settings,
    )


def tiny_text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """One layer of width 16."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def tiny_sd(scheduler: Any = None, **unet: Any) -> diffusers.StableDiffusionPipeline:
    """A Stable Diffusion pipeline of 16 x 16 pixels."""
    tokenizer = tiny_tokenizer()
    denoiser = tiny_unet(**unet)
    torch.manual_seed(2)
    pipe = diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=denoiser,
        scheduler=scheduler or tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _quiet(pipe)


def tiny_dit(scheduler: Any = None, **transformer: Any) -> diffusers.DiTPipeline:
    """A DiT pipeline of 16 x 16 pixels."""
    pipe = diffusers.DiTPipeline(
        transformer=tiny_transformer(**transformer),
        vae=tiny_vae(),
        scheduler=scheduler or tiny_scheduler(),
    )
    _excite(pipe.transformer)
    return _quiet(pipe)


def tiny_model(pipe: Any, name: str = "tiny") -> LoadedModel:
    """The pipeline as the rest of dipgo_core sees it."""
    return loaded_model(pipe, ModelSettings(id=name), weights_sha256="0" * 64)


def gated_latents(
    model: LoadedModel, graph: BlockGraph, table: GateTable, batch: Batch, sampler: SamplerSettings
) -> Tensor:
    """What a run decodes whose gates are hard."""
    with torch.no_grad(), gated_calls(model, graph, table) as calls:
        return rollout(model, batch, sampler, on_call=calls.start_call)


def _excite(module: torch.nn.Module) -> None:
    """Give every parameter a seeded value, so that no zero initialisation hides an error."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.05 * noise)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
