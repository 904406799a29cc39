"""LPIPS: distance of an image from its dense twin in the features of a classifier.

Zhang et al. 2018, version 0.1; torchmetrics' network, whose linear heads lie in its package. The
classifier's weights are torchvision's published file, read from this machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _NoTrainLpips

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.lpips_files import backbone_of, check_side, checked_backbone
from dipgo_core.evaluation.published import read_tensors
from dipgo_core.evaluation.scorers import Scorer, lpips_scorer
from dipgo_core.evaluation.vision_model import check_finite, check_pair

_CHUNK = 16  # pairs of images the network sees at once


@dataclass(frozen=True, eq=False)
class LpipsScorer:
    """A loaded LPIPS network."""

    scorer: Scorer
    network: Any


def load_lpips(name: str, *, device: str | torch.device = "cpu") -> LpipsScorer:
    """Load "lpips-alex" or "lpips-vgg", from torch.hub's cache or "lpips-alex:FILE".

    Raises:
        UnknownModelError: no LPIPS has this name.
        ModelFilesError: the classifier's file is missing, torn, or another one.
    """
    backbone = backbone_of(name)
    weights = read_tensors(checked_backbone(name))
    network = _NoTrainLpips(net=backbone.net, pnet_rand=True)  # random until the next line
    _fill(network.net, weights, name)
    return LpipsScorer(lpips_scorer(name), network.to(device))


@torch.no_grad()
def lpips_distances(lpips: LpipsScorer, images: Tensor, dense: Tensor) -> npt.NDArray[np.float64]:
    """Return the LPIPS of each pair, 0 for equal images.  # (n, 3, H, W) uint8 twice -> (n,)

    Raises:
        EvaluationError: not images of one shape, too small, or distances that are not finite.
    """
    check_pair(images, dense, lpips.scorer.id)
    check_side(lpips.scorer.id, min(images.shape[-2:]))
    parts = [
        _distances(lpips, images[start : start + _CHUNK], dense[start : start + _CHUNK])
        for start in range(0, len(images), _CHUNK)
    ]
    distances: npt.NDArray[np.float64] = torch.cat(parts).cpu().numpy()
    return distances


def _distances(lpips: LpipsScorer, images: Tensor, dense: Tensor) -> Tensor:
    device = lpips.network.lin0.model[-1].weight.device
    pair = (part.to(device).float() / 255 for part in (images, dense))
    values = lpips.network(*pair, normalize=True)  # (n, 1, 1, 1)
    return check_finite(values.flatten(), lpips.scorer.id).double()


def _fill(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    """Put torchvision's ``features.N.*`` into the slices, whose layers keep the number N."""
    wanted = {key: "features." + key.partition(".")[2] for key in network.state_dict()}
    try:
        network.load_state_dict({key: weights[source] for key, source in wanted.items()})
    except RuntimeError as error:
        raise ModelFilesError(f"the classifier of {name} has other shapes: {error}") from error
