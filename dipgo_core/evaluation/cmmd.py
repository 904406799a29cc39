"""The embeddings that CMMD compares: unit CLIP image features (Jayasumana et al. 2024).

The distance itself is in `cmmd_distance`, without torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPConfig, CLIPVisionModelWithProjection

from dipgo_core.evaluation.open_clip_weights import load_open_clip_tower
from dipgo_core.evaluation.scorers import OPEN_CLIP, Scorer, cmmd_scorer, model_type_of
from dipgo_core.evaluation.vision_model import (
    check_finite,
    check_images,
    fetched_network,
    load_vision_model,
)

_CHUNK = 32  # images the model sees at once


@dataclass(frozen=True, eq=False)
class CmmdEmbedder:
    """A loaded CLIP image tower: uint8 images in, (n, d) float32 unit features out."""

    scorer: Scorer
    model: Any
    mean: Tensor
    std: Tensor

    @torch.no_grad()
    def __call__(self, images: Tensor) -> npt.NDArray[np.float32]:
        """Return the embeddings of uint8 images (n, 3, H, W).

        Raises:
            EvaluationError: images of another type, or embeddings that are not finite.
        """
        check_images(images, self.scorer.id)
        parts = [
            self._embed(images[start : start + _CHUNK]) for start in range(0, len(images), _CHUNK)
        ]
        embeddings: npt.NDArray[np.float32] = torch.cat(parts).cpu().numpy()
        return embeddings

    def _embed(self, images: Tensor) -> Tensor:
        embeddings = self.model(pixel_values=self._pixels(images)).image_embeds  # (n, d)
        return functional.normalize(check_finite(embeddings, self.scorer.id).float(), dim=-1)

    def _pixels(self, images: Tensor) -> Tensor:
        """The whole image is squeezed into the model's square, as in the paper's code: no crop."""
        side = int(self.model.config.image_size)
        pixels = functional.interpolate(
            images.to(self.model.device).float() / 255,
            size=(side, side),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        return (pixels - self.mean) / self.std


def load_cmmd(name: str, *, device: str | torch.device = "cpu") -> CmmdEmbedder:
    """Load the image tower of a CLIP by bundled name, hub id (``owner/name@revision``) or folder.

    Raises:
        ModelFilesError: files are missing or torn, or of another kind of model.
    """
    pinned, folder = fetched_network(name)
    model, means = _tower(folder)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in means)
    return CmmdEmbedder(cmmd_scorer(pinned), model.to(device), mean, std)


def _tower(folder: Path) -> tuple[Any, tuple[Sequence[float], Sequence[float]]]:
    """Return the image tower, and mean and standard deviation of the channels it was trained on."""
    kind = model_type_of("cmmd", folder)
    if kind == OPEN_CLIP:
        model, config = load_open_clip_tower(folder)
        return model, (config.preprocess.mean, config.preprocess.std)
    tower = None
    if kind == "clip":  # its whole tells how wide the projection is
        whole = CLIPConfig.from_pretrained(folder)
        tower = whole.vision_config
        tower.projection_dim = whole.projection_dim
    model, processor = load_vision_model(folder, CLIPVisionModelWithProjection, config=tower)
    return model, (processor.image_mean, processor.image_std)
