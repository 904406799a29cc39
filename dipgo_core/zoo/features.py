"""tiny-features: the small classifier whose 64 features measure FID and KID on tinted garments."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

FEATURE_DIM: Final = 64
IMAGE_SIZE: Final = 32


class TinyFeatures(nn.Module):
    """Residual convnet that names garment, colour and background from 64 shared features."""

    def __init__(self, *, width: int = 16, num_classes: tuple[int, ...] = (10, 7, 4)) -> None:
        super().__init__()
        self.width = width
        self.num_classes = num_classes
        self.stem = _conv(3, width, stride=1)
        self.stages = nn.Sequential(
            _conv(width, 2 * width, stride=2),
            Residual(2 * width),
            _conv(2 * width, 4 * width, stride=2),
            Residual(4 * width),
            _conv(4 * width, 4 * width, stride=2),
        )
        self.to_features = nn.Linear(4 * width, FEATURE_DIM)
        self.heads = nn.ModuleList(nn.Linear(FEATURE_DIM, count) for count in num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns (N, 64) float32 features of uint8 images (N, 3, H, W)."""
        pixels = images.to(self.to_features.weight.dtype) / 127.5 - 1
        if pixels.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            size = (IMAGE_SIZE, IMAGE_SIZE)
            pixels = functional.interpolate(
                pixels, size=size, mode="bilinear", align_corners=False, antialias=True
            )
        hidden = self.stages(self.stem(pixels))  # (N, 4 * width, 4, 4)
        return torch.nn.functional.silu(self.to_features(hidden.mean(dim=(-2, -1))))

    def classify(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns the logits of garment, colour and background."""
        features = self(images)
        return tuple(head(features) for head in self.heads)

    def save_pretrained(self, folder: Path) -> None:
        """Writes ``config.json`` and float16 ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "kind": "dipgo.features",
            "schema_version": 1,
            "width": self.width,
            "num_classes": list(self.num_classes),
            "feature_dim": FEATURE_DIM,
            "image_size": IMAGE_SIZE,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        weights = {
            name: (value.half() if value.is_floating_point() else value).contiguous()
            for name, value in self.state_dict().items()
        }
        save_file(weights, folder / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TinyFeatures:
        """Loads the network in float32, ready to evaluate."""
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
        model = cls(width=config["width"], num_classes=tuple(config["num_classes"]))
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval().requires_grad_(False)


class Residual(nn.Module):
    """Two convolutions beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(width, width, stride=1), _conv(width, width, stride=1))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = hidden + self.branch(hidden)
        return result


def _conv(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )
