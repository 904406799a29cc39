"""Writing the bundled models as folders of float16 safetensors that stock loaders read."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TypeVar

import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from dipgo_core.zoo.architectures import build_image_processor, build_noise_scheduler
from dipgo_core.zoo.data import all_captions

M = TypeVar("M", bound=nn.Module)

MAX_SHARD: Final = "6MB"


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """Yields an empty folder that takes the place of ``folder`` when the block succeeds."""
    fresh = folder.with_name(f".{folder.name}.new")
    stale = folder.with_name(f".{folder.name}.old")
    for leftover in (fresh, stale):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for config_file in fresh.rglob("config.json"):
        forget_origin(config_file)
    if folder.exists():
        folder.rename(stale)
    fresh.rename(folder)
    shutil.rmtree(stale, ignore_errors=True)


def forget_origin(config_file: Path) -> None:
    """Drops the path that a part was once loaded from, which diffusers keeps in its config."""
    config = json.loads(config_file.read_text("utf-8"))
    config.pop("_name_or_path", None)
    config_file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def half(model: M) -> M:
    """Returns a float16 copy for storage."""
    copied = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    return copied.to(dtype=torch.float16)


def export_vae(folder: Path, vae: AutoencoderKL) -> None:
    """Writes the autoencoder alone, for the trainings that need its latents."""
    with replaced_folder(folder) as fresh:
        half(vae).save_pretrained(fresh)


def export_tiny_sd(
    folder: Path,
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Writes tiny-sd as a ``StableDiffusionPipeline`` without a safety checker."""
    pipe = StableDiffusionPipeline(
        vae=half(vae),
        unet=half(unet),
        text_encoder=half(text_encoder),
        tokenizer=tokenizer,
        scheduler=build_noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with replaced_folder(folder) as fresh:
        pipe.save_pretrained(fresh, max_shard_size=MAX_SHARD)
        _load_as_float32(fresh / "text_encoder" / "config.json")


def export_tiny_dit(folder: Path, *, vae: AutoencoderKL, dit: DiTTransformer2DModel) -> None:
    """Writes tiny-dit as a ``DiTPipeline`` whose label ``i`` is caption ``i``."""
    pipe = DiTPipeline(transformer=half(dit), vae=half(vae), scheduler=build_noise_scheduler())
    with replaced_folder(folder) as fresh:
        pipe.save_pretrained(fresh, max_shard_size=MAX_SHARD)
        _add_labels(fresh / "model_index.json")


def export_clip(folder: Path, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """Writes the scorer with its processor."""
    with replaced_folder(folder) as fresh:
        half(model).save_pretrained(fresh)
        CLIPProcessor(build_image_processor(), tokenizer).save_pretrained(fresh)
        _load_as_float32(fresh / "config.json")


def _add_labels(index_file: Path) -> None:
    """Names the classes: ``DiTPipeline`` reads ``id2label`` but does not save it."""
    index = json.loads(index_file.read_text("utf-8"))
    index["id2label"] = {str(label): text for label, text in enumerate(all_captions())}
    index_file.write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _load_as_float32(config_file: Path) -> None:
    """Transformers loads in the dtype its config names, diffusers in float32: make them agree."""
    config = json.loads(config_file.read_text("utf-8"))
    for part in (config, config.get("text_config", {}), config.get("vision_config", {})):
        if "dtype" in part:
            part["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
