"""ImageReward's forward pass spelled out from its published tensors: an oracle, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

HEADS = 2
Weights = Mapping[str, Tensor]


def reward_by_hand(weights: Weights, pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """pixels: normalised (n, 3, s, s); tokens, mask: (n, 35).  # -> (n,)"""
    state = {name: value.double() for name, value in weights.items() if value.is_floating_point()}
    seen = _see(_under(state, "blip.visual_encoder."), pixels.double())
    read = _read(_under(state, "blip.text_encoder."), tokens, mask, seen)
    values = read[:, 0]
    for number in (0, 2, 4, 6, 7):
        values = _linear(state, f"mlp.layers.{number}", values)
    return (values[:, 0] - 0.16717362830052426) / 1.0333394966054072


def _see(w: Weights, pixels: Tensor) -> Tensor:
    """A pre-norm vision transformer."""
    patches = F.conv2d(pixels, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = torch.cat([w["cls_token"].expand(len(pixels), -1, -1), patches.flatten(2).mT], dim=1)
    x = x + w["pos_embed"]
    for block in ("blocks.0", "blocks.1"):
        query, key, value = _linear(w, f"{block}.attn.qkv", _norm(w, f"{block}.norm1", x)).chunk(
            3, dim=-1
        )
        x = x + _linear(w, f"{block}.attn.proj", _attend(query, key, value))
        inner = F.gelu(_linear(w, f"{block}.mlp.fc1", _norm(w, f"{block}.norm2", x)))
        x = x + _linear(w, f"{block}.mlp.fc2", inner)
    return _norm(w, "norm", x)


def _read(w: Weights, tokens: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
    """A post-norm BERT whose layers also attend to the image."""
    x = w["embeddings.word_embeddings.weight"][tokens]
    x = x + w["embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = _norm(w, "embeddings.LayerNorm", x, 1e-12)
    for layer in ("encoder.layer.0", "encoder.layer.1"):
        x = _attention(w, f"{layer}.attention", x, x, mask[:, None, None].bool())
        x = _attention(w, f"{layer}.crossattention", x, seen, None)
        inner = F.gelu(_linear(w, f"{layer}.intermediate.dense", x))
        x = _norm(
            w, f"{layer}.output.LayerNorm", x + _linear(w, f"{layer}.output.dense", inner), 1e-12
        )
    return x


def _attention(w: Weights, name: str, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
    query = _linear(w, f"{name}.self.query", x)
    key, value = (_linear(w, f"{name}.self.{part}", memory) for part in ("key", "value"))
    out = _linear(w, f"{name}.output.dense", _attend(query, key, value, mask))
    return _norm(w, f"{name}.output.LayerNorm", x + out, 1e-12)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    parts = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
    out = F.scaled_dot_product_attention(*parts, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def _linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def _norm(w: Weights, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _under(state: Weights, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
