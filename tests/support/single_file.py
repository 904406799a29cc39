"""Stable Diffusion as one file of weights, under the names of its original repository.

Names: those of ldm's U-Net, autoencoder and text encoder (CompVis, 2022), read back from what
diffusers' single-file loader maps them to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def write_single_file(pipe: Any, path: Path) -> Path:
    """Write a Stable Diffusion pipeline's weights as one file."""
    layers = pipe.unet.config.layers_per_block
    tensors: dict[str, Tensor] = {}
    for name, tensor in pipe.unet.state_dict().items():
        tensors[f"model.diffusion_model.{_unet_name(name, layers)}"] = tensor
    levels = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        original = _vae_name(name, levels)
        linear = ".attn_1." in original and original.endswith("weight") and ".norm." not in original
        tensors[f"first_stage_model.{original}"] = tensor[:, :, None, None] if linear else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        bare = name.removeprefix("text_model.")
        tensors[f"cond_stage_model.transformer.text_model.{bare}"] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


def _unet_name(name: str, layers: int) -> str:
    for ours, theirs in _UNET.items():
        if name.startswith(f"{ours}."):
            return name.replace(ours, theirs, 1)
    mid = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", name)
    if mid:
        place = 1 if mid[1] == "attentions" else 2 * int(mid[2])
        return f"middle_block.{place}.{_inside(mid[1], mid[3])}"
    side, block, kind, place, rest = re.fullmatch(
        r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.+)", name
    ).groups()
    blocks = "input_blocks" if side == "down" else "output_blocks"
    first = int(block) * (layers + 1) + (1 if side == "down" else 0)
    if kind == "downsamplers":
        return f"{blocks}.{first + layers}.0.{rest.replace('conv', 'op', 1)}"
    if kind == "upsamplers":  # behind the last resnet, and its attention where there is one
        return f"{blocks}.{first + layers}.{1 if block == '0' else 2}.{rest}"
    part = 1 if kind == "attentions" else 0
    return f"{blocks}.{first + int(place)}.{part}.{_inside(kind, rest)}"


def _inside(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    part, _, tensor = rest.rpartition(".")
    return f"{_RESNET[part]}.{tensor}"


def _vae_name(name: str, levels: int) -> str:
    name = re.sub(
        r"decoder\.up_blocks\.(\d)", lambda m: f"decoder.up.{levels - 1 - int(m[1])}", name
    )
    name = re.sub(r"encoder\.down_blocks\.(\d)", r"encoder.down.\1", name)
    name = re.sub(r"\.resnets\.(\d)", lambda m: f".block.{m[1]}", name)
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.block\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1")
    for ours, theirs in _VAE_ATTENTION.items():
        name = name.replace(f"attn_1.{ours}.", f"attn_1.{theirs}.")
    return name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
