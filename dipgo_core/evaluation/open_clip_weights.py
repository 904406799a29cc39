"""CLIPs saved by open_clip as transformers' CLIP: the same tensors under other names.

Converted in memory at each load, not into a cache: slices of the file's tensors become the
parameters, so that nothing is copied but the two projections, which are transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.open_clip_config import OpenClip, Tower, read_open_clip
from dipgo_core.evaluation.vision_model import unreported
from dipgo_core.model_files import OPEN_CLIP_WEIGHTS

#: Where a tensor goes that keeps its values, apart from those of the layers.
_NAMES: Final = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
#: Projections multiply from the right here, from the left there.
_TRANSPOSED: Final = {
    "visual.proj": "visual_projection.weight",
    "text_projection": "text_projection.weight",
}
_LAYERS: Final = {
    "transformer.resblocks.": "text_model.encoder.layers.",
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
}
_LAYER: Final = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_IMAGE: Final = ("vision_model.", "visual_projection.")


def load_open_clip(folder: Path) -> tuple[Any, OpenClip]:
    """Return a folder's CLIP as transformers' CLIPModel in float32, on the CPU and without
    gradients, and what it was saved with.

    Raises:
        ModelFilesError: files are missing or torn, or the network is of another kind.
    """
    config = read_open_clip(folder)
    return _model(CLIPModel, clip_config(config), _weights(folder), folder), config


def load_open_clip_tower(folder: Path) -> tuple[Any, OpenClip]:
    """Return the image tower alone, with its projection, of a folder's CLIP, and what it was saved
    with.

    Raises:
        ModelFilesError: as of `load_open_clip`.
    """
    config = read_open_clip(folder)
    tower = clip_config(config).vision_config
    tower.projection_dim = config.embed_dim
    weights = {name: x for name, x in _weights(folder).items() if name.startswith(_IMAGE)}
    return _model(CLIPVisionModelWithProjection, tower, weights, folder), config


def clip_config(config: OpenClip) -> CLIPConfig:
    """Return transformers' config of the same network. Texts are pooled where the highest token
    is, which is the one that ends them."""
    text = _tower(config.text, config) | {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "bos_token_id": max(config.vocab_size - 2, 0),
        "eos_token_id": config.vocab_size - 1,
        "pad_token_id": 0,
    }
    vision = _tower(config.vision, config) | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=config.embed_dim)


def _tower(tower: Tower, config: OpenClip) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": config.activation,
        "projection_dim": config.embed_dim,
    }


def transformers_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return open_clip's tensors under transformers' names; names that are unknown stay."""
    return {name: value for item in weights.items() for name, value in _renamed(*item)}


def _renamed(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name in _TRANSPOSED:
        yield _TRANSPOSED[name], value.T.contiguous()
        return
    for theirs, ours in _LAYERS.items():
        if name.startswith(theirs):
            number, _, part = name.removeprefix(theirs).partition(".")
            yield from _of_layer(f"{ours}{number}.", part, value)
            return
    yield _NAMES.get(name, name), value


def _of_layer(layer: str, part: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    if part.startswith("attn.in_proj_"):  # the rows of queries, keys and values, stacked
        kind = part.removeprefix("attn.in_proj_")
        for name, rows in zip("qkv", value.chunk(3), strict=True):
            yield f"{layer}self_attn.{name}_proj.{kind}", rows
        return
    stem, _, kind = part.rpartition(".")
    yield f"{layer}{_LAYER.get(stem, stem)}.{kind}", value


def _weights(folder: Path) -> dict[str, Tensor]:
    path = folder / OPEN_CLIP_WEIGHTS
    try:
        return transformers_weights(load_file(path))
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be loaded ({error}): copy it again") from error


def _model(model_class: Any, config: Any, weights: dict[str, Tensor], folder: Path) -> Any:
    """Fill a model; every parameter must be in the file, and every tensor of the file in it."""
    try:
        with unreported():
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # told below, by name
                output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFilesError(f"the CLIP in {folder} cannot be loaded: {error}") from error
    faults = {
        "lacks": sorted(info["missing_keys"]),
        "also holds": sorted(info["unexpected_keys"]),
        "has another shape of": sorted(name for name, *_ in info["mismatched_keys"]),
    }
    if told := [f"{what} {names[0]} ({len(names)})" for what, names in faults.items() if names]:
        raise ModelFilesError(
            f"{folder / OPEN_CLIP_WEIGHTS} is not the CLIP that its config describes: it "
            f"{', '.join(told)}; copy both files again"
        )
    return model.eval().requires_grad_(False)
