"""DINO distance: 1 - cosine of the DINOv2 features of an image and its dense twin.

DINOv2: Oquab et al. 2023; the cosine of its class tokens as a measure of likeness: Ruiz et al. 2023
(DreamBooth, there with DINO).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel

from dipgo_core.evaluation.scorers import Scorer, dino_scorer, model_type_of
from dipgo_core.evaluation.vision_model import (
    check_finite,
    check_pair,
    fetched_network,
    load_vision_model,
)

_CHUNK = 32  # images the model sees at once


@dataclass(frozen=True, eq=False)
class DinoScorer:
    """A loaded DINOv2."""

    scorer: Scorer
    model: Any
    processor: Any


def load_dino(name: str, *, device: str | torch.device = "cpu") -> DinoScorer:
    """Load a DINOv2 by hub id (``owner/name@revision``) or folder.

    Raises:
        ModelFilesError: files are missing or torn, or of another kind of model.
    """
    pinned, folder = fetched_network(name)
    model_type_of("dino", folder)
    model, processor = load_vision_model(folder, AutoModel)
    return DinoScorer(dino_scorer(pinned), model.to(device), processor)


@torch.no_grad()
def dino_distances(dino: DinoScorer, images: Tensor, dense: Tensor) -> npt.NDArray[np.float64]:
    """Return the distance of each pair, 0 to 2.  # (n, 3, H, W) uint8 twice -> (n,)

    Raises:
        EvaluationError: not images of one shape, or features that are not finite.
    """
    check_pair(images, dense, dino.scorer.id)
    parts = [
        _distances(dino, images[start : start + _CHUNK], dense[start : start + _CHUNK])
        for start in range(0, len(images), _CHUNK)
    ]
    distances: npt.NDArray[np.float64] = torch.cat(parts).cpu().numpy()
    return distances


def _distances(dino: DinoScorer, images: Tensor, dense: Tensor) -> Tensor:
    """Half the squared distance of unit vectors is 1 - cosine, exactly 0 for equal ones."""
    difference = _features(dino, images) - _features(dino, dense)  # (n, d)
    return difference.square().sum(dim=-1) / 2


def _features(dino: DinoScorer, images: Tensor) -> Tensor:
    pixels = dino.processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
    features = dino.model(pixel_values=pixels.to(dino.model.device)).pooler_output
    return functional.normalize(check_finite(features, dino.scorer.id).double(), dim=-1)
