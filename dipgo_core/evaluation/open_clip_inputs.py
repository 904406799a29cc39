"""Images and prompts as open_clip prepares them: resized by Pillow, cleaned by ftfy."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as images
from transformers import CLIPTokenizer

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.open_clip_config import OpenClip


def open_clip_pixels(batch: Tensor, config: OpenClip) -> Tensor:
    """Return what the image tower sees.  # (n, 3, H, W) uint8 -> (n, 3, side, side) float32

    Pillow resizes on the CPU, as in open_clip: resizing tensors gives other pixels.
    """
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (config.preprocess.mean, config.preprocess.std)
    )
    squares = [
        images.pil_to_tensor(_square(images.to_pil_image(image), config)) for image in batch.cpu()
    ]
    return (torch.stack(squares).float() / 255 - mean) / std


def _square(image: Image.Image, config: OpenClip) -> Image.Image:
    side, preprocess = config.image_size, config.preprocess
    size = _resized_size(image.size, config)
    image = images.resize(image, size, InterpolationMode(preprocess.interpolation))
    if preprocess.resize_mode == "longest":
        return _padded(image, side, preprocess.fill_color)
    middle: Image.Image = images.center_crop(image, [side, side])
    return middle


def _resized_size(size: tuple[int, int], config: OpenClip) -> list[int]:
    """Return height and width to resize to; one number alone is that of the shorter side."""
    side = config.image_size
    if config.preprocess.resize_mode == "shortest":
        return [side]
    if config.preprocess.resize_mode == "squash":
        return [side, side]
    width, height = (round(length / (max(size) / side)) for length in size)
    return [height, width]


def _padded(image: Image.Image, side: int, color: int) -> Image.Image:
    """Pad to a square, the odd pixel at the right or the bottom."""
    width, height = (side - length for length in image.size)
    border = [width // 2, height // 2, (width + 1) // 2, (height + 1) // 2]
    padded: Image.Image = images.pad(image, border, fill=color)
    return padded


def open_clip_tokens(folder: Path, config: OpenClip) -> Callable[[Sequence[str]], Any]:
    """Return what turns prompts into ``input_ids`` and ``attention_mask``, (n, context_length),
    by the folder's own vocabulary.

    Raises:
        ModelFilesError: the tokenizer's files are missing, broken, or of another vocabulary.
    """
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    except Exception as error:  # the library raises that very class, too
        raise ModelFilesError(f"the tokenizer in {folder} cannot be loaded: {error}") from error
    if tokenizer.eos_token_id != config.vocab_size - 1:
        raise ModelFilesError(
            f"the tokenizer in {folder} ends texts with token {tokenizer.eos_token_id}, the CLIP "
            f"there looks for {config.vocab_size - 1}: copy tokenizer.json (or vocab.json and "
            "merges.txt) of the same repository"
        )
    return lambda prompts: tokenizer(
        [cleaned(prompt) for prompt in prompts],
        padding="max_length",
        truncation=True,
        max_length=config.context_length,
        return_tensors="pt",
    )


def cleaned(prompt: str) -> str:
    """Return a prompt with its encoding mended, HTML's entities read and spaces made one."""
    mended = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return " ".join(mended.split()).lower()
