"""The data set of the bundled models: Fashion-MNIST, tinted, with one caption per image.

Every grey garment is padded to 32x32 and shown in one of 7 colours on one of 4 backgrounds, so
the 10 x 7 x 4 = 280 captions, such as "a red sneaker on a navy background", say all there is.
"""

from __future__ import annotations

import gzip
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch

GARMENTS: Final = (
    "tee",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
COLOURS: Final = {
    "red": (235, 35, 35),
    "orange": (255, 145, 20),
    "yellow": (250, 240, 60),
    "green": (50, 205, 60),
    "cyan": (60, 220, 245),
    "magenta": (230, 60, 225),
    "white": (255, 255, 255),
}
BACKGROUNDS: Final = {
    "black": (0, 0, 0),
    "navy": (15, 25, 120),
    "brown": (95, 55, 20),
    "gray": (120, 120, 120),
}
IMAGE_SIZE: Final = 32
NUM_CAPTIONS: Final = len(GARMENTS) * len(COLOURS) * len(BACKGROUNDS)
DEFAULT_DATA_DIR: Final = Path("/usr/share/datasets/fashion-mnist")  # Debian's package

_FILE_PREFIX: Final = {"train": "train", "held_out": "t10k"}


@dataclass(frozen=True)
class GreyImages:
    """One half of Fashion-MNIST as published.

    Attributes:
        pixels: (N, 28, 28) uint8.
        garments: (N,) int64, index into ``GARMENTS``.
    """

    pixels: torch.Tensor
    garments: torch.Tensor


@dataclass(frozen=True)
class TintedImages:
    """Coloured images and the index of each one's caption.

    Attributes:
        pixels: (N, 3, 32, 32) uint8.
        captions: (N,) int64, index into ``all_captions()``.
    """

    pixels: torch.Tensor
    captions: torch.Tensor


def all_captions() -> tuple[str, ...]:
    """Returns the 280 captions; caption ``i`` is also the class label ``i`` of tiny-dit."""
    return tuple(
        f"{_article(colour)} {colour} {garment} on a {background} background"
        for garment in GARMENTS
        for colour in COLOURS
        for background in BACKGROUNDS
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption_parts(captions: torch.Tensor) -> torch.Tensor:
    """Returns (N, 3): the garment, colour and background index of each caption index."""
    per_garment = len(COLOURS) * len(BACKGROUNDS)
    garments = captions // per_garment
    colours = captions % per_garment // len(BACKGROUNDS)
    return torch.stack([garments, colours, captions % len(BACKGROUNDS)], dim=-1)


def split_captions(
    seed: int = 0, *, test_per_garment: int = 10
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Splits the captions into calibration and test, the same number of each garment."""
    rng = random.Random(seed)
    captions = all_captions()
    per_garment = NUM_CAPTIONS // len(GARMENTS)
    test: set[int] = set()
    for garment in range(len(GARMENTS)):
        members = range(garment * per_garment, (garment + 1) * per_garment)
        test.update(rng.sample(members, test_per_garment))
    calibration = tuple(text for i, text in enumerate(captions) if i not in test)
    return calibration, tuple(text for i, text in enumerate(captions) if i in test)


def load_grey(data_dir: Path, half: Literal["train", "held_out"]) -> GreyImages:
    """Reads one half of Fashion-MNIST from its published gzip files."""
    prefix = _FILE_PREFIX[half]
    images = _read_idx(data_dir / f"{prefix}-images-idx3-ubyte.gz", header_bytes=16)
    labels = _read_idx(data_dir / f"{prefix}-labels-idx1-ubyte.gz", header_bytes=8)
    return GreyImages(
        torch.from_numpy(images.reshape(-1, 28, 28)), torch.from_numpy(labels.astype(np.int64))
    )


def _read_idx(path: Path, *, header_bytes: int) -> np.ndarray:
    with gzip.open(path, "rb") as stream:
        return np.frombuffer(stream.read(), dtype=np.uint8, offset=header_bytes).copy()


def tint(grey: torch.Tensor, garments: torch.Tensor, generator: torch.Generator) -> TintedImages:
    """Pads grey garments to 32x32 and gives each a drawn colour and background.

    Args:
        grey: (N, 28, 28) uint8.
        garments: (N,) garment indices.
    """
    num_images = len(grey)
    colours = torch.randint(len(COLOURS), (num_images,), generator=generator)
    backgrounds = torch.randint(len(BACKGROUNDS), (num_images,), generator=generator)
    captions = (garments * len(COLOURS) + colours) * len(BACKGROUNDS) + backgrounds
    colour_rgb = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[colours]
    background_rgb = torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32)[backgrounds]
    margin = (IMAGE_SIZE - grey.shape[-1]) // 2
    cover = torch.nn.functional.pad(grey, (margin,) * 4).float()[:, None] / 255  # (N, 1, 32, 32)
    pixels = torch.lerp(background_rgb[..., None, None], colour_rgb[..., None, None], cover)
    return TintedImages(pixels.round().to(torch.uint8), captions)


def held_out_images(data_dir: Path, *, seed: int = 1) -> TintedImages:
    """Returns the 10,000 held-out real images, tinted with seeded draws."""
    grey = load_grey(data_dir, "held_out")
    return tint(grey.pixels, grey.garments, torch.Generator().manual_seed(seed))


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """Maps uint8 pixels to float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1
