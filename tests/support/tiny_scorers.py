"""Tiny seeded scoring networks in the files of the real ones: real classes, random weights."""

from __future__ import annotations

from pathlib import Path

import torch
import torchvision
from torch import Tensor
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
)

REWARD_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "cat", "dog", "##s", "the")
_WIDTH = 128  # two heads
_MLP = (_WIDTH, 32, 16, 8, 4, 1)


def random_images(n: int, side: int = 32, seed: int = 0) -> Tensor:
    """Smooth noise, uint8.  # (n, 3, side, side)"""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((n, 3, 6, 6), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear")
    return (smooth * 255).round().to(torch.uint8)


def save_dinov2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    processor = BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28})
    Dinov2Model(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def save_clip_tower(folder: Path) -> Path:
    """A CLIP image tower alone."""
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(_clip_vision(projection_dim=8)).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    ).save_pretrained(folder)
    return folder


def save_clip(folder: Path) -> Path:
    """A whole CLIP, whose image tower does not tell how wide the projection is."""
    torch.manual_seed(1)
    config = CLIPConfig(
        text_config={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        vision_config=_clip_vision(projection_dim=512).to_dict(),
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor().save_pretrained(folder)
    return folder


def _clip_vision(projection_dim: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=projection_dim,
    )


def classifier_weights(net: str) -> dict[str, Tensor]:
    """The convolutions of torchvision's AlexNet (alex) or VGG-16 (vgg), as in its files."""
    torch.manual_seed(0)
    model = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]()
    return {k: v for k, v in model.state_dict().items() if k.startswith("features.")}


def save_classifier(path: Path, net: str = "alex") -> Path:
    torch.save(classifier_weights(net), path)
    return path


def save_image_reward(folder: Path) -> Path:
    """ImageReward's two files, at a fraction of its size."""
    torch.save(reward_weights(), folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(REWARD_WORDS) + "\n")
    return folder


def reward_weights() -> dict[str, Tensor]:
    """Random tensors under the published names: 2 + 2 layers, patches of 8, images of 32."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        **_vision_shapes(),
        **_text_shapes(),
        **{
            f"mlp.layers.{number}.{kind}": (wide, narrow) if kind == "weight" else (wide,)
            for number, narrow, wide in zip((0, 2, 4, 6, 7), _MLP[:-1], _MLP[1:], strict=True)
            for kind in ("weight", "bias")
        },
        "blip.vision_proj.weight": (4, _WIDTH),
        "blip.text_proj.weight": (4, _WIDTH),
    }
    weights = {
        name: torch.randn(shape, generator=generator) * 0.2 + ("norm" in name.lower())
        for name, shape in shapes.items()
    }
    return {**weights, "blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


def _vision_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, _WIDTH),
        "pos_embed": (1, 17, _WIDTH),
        "patch_embed.proj.weight": (_WIDTH, 3, 8, 8),
        "patch_embed.proj.bias": (_WIDTH,),
        **_layer("norm", _WIDTH),
    }
    for block in ("blocks.0.", "blocks.1."):
        shapes |= _layer(f"{block}norm1", _WIDTH) | _layer(f"{block}norm2", _WIDTH)
        shapes |= _layer(f"{block}attn.qkv", 3 * _WIDTH, _WIDTH)
        shapes |= _layer(f"{block}attn.proj", _WIDTH, _WIDTH)
        shapes |= _layer(f"{block}mlp.fc1", 64, _WIDTH) | _layer(f"{block}mlp.fc2", _WIDTH, 64)
    return {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}


def _text_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(REWARD_WORDS) + 2, _WIDTH),
        "embeddings.position_embeddings.weight": (40, _WIDTH),
        **_layer("embeddings.LayerNorm", _WIDTH),
    }
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        for attention in ("attention", "crossattention"):
            for part in ("query", "key", "value"):
                shapes |= _layer(f"{layer}{attention}.self.{part}", _WIDTH, _WIDTH)
            shapes |= _layer(f"{layer}{attention}.output.dense", _WIDTH, _WIDTH)
            shapes |= _layer(f"{layer}{attention}.output.LayerNorm", _WIDTH)
        shapes |= _layer(f"{layer}intermediate.dense", 64, _WIDTH)
        shapes |= _layer(f"{layer}output.dense", _WIDTH, 64)
        shapes |= _layer(f"{layer}output.LayerNorm", _WIDTH)
    return {f"blip.text_encoder.{name}": shape for name, shape in shapes.items()}


def _layer(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
