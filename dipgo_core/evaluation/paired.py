"""PSNR and SSIM of images against the dense images of the same seeds (torchmetrics)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from dipgo_core.errors import EvaluationError

#: PSNR of identical images, whose true value is infinite: without a cap one of them would make a
#: mean infinite. One grey level off in every hundredth value reads 68 dB; above 100 all is equal.
MAX_PSNR = 100.0
#: Bytes of images that are in floating point at once: SSIM holds some sixty times as much.
CHUNK_BYTES = 2**20


def psnr(images: Tensor, dense: Tensor) -> npt.NDArray[np.float64]:
    """Return the PSNR of each image in dB, at most 100.  # (n, 3, H, W) uint8 twice -> (n,)

    Raises:
        EvaluationError: the two are not images of the same number and size.
    """
    _check(images, dense)
    return _in_chunks(_psnr, images, dense)


def ssim(images: Tensor, dense: Tensor) -> npt.NDArray[np.float64]:
    """Return the SSIM of each image.  # (n, 3, H, W) uint8 twice -> (n,)

    Raises:
        EvaluationError: the two are not images of the same number and size, or under 6 x 6.
    """
    _check(images, dense)
    if min(images.shape[-2:]) < 6:
        raise EvaluationError(f"SSIM needs images of 6 x 6 or more, got {tuple(images.shape)}")
    return _in_chunks(_ssim, images, dense)


def _psnr(images: Tensor, dense: Tensor) -> Tensor:
    values: Tensor = peak_signal_noise_ratio(
        images.double(), dense.double(), data_range=255.0, reduction="none", dim=(1, 2, 3)
    )
    return values.clamp(max=MAX_PSNR)


def _ssim(images: Tensor, dense: Tensor) -> Tensor:
    values: Tensor = structural_similarity_index_measure(
        images.float() / 255, dense.float() / 255, data_range=1.0, reduction="none"
    )
    return values.reshape(-1).double()


def _in_chunks(
    figure: Callable[[Tensor, Tensor], Tensor], images: Tensor, dense: Tensor
) -> npt.NDArray[np.float64]:
    """Bounded by bytes: a batch of large images in floating point would be many times as large."""
    size = max(1, CHUNK_BYTES // images[0].numel())
    parts = [
        figure(images[start : start + size], dense[start : start + size])
        for start in range(0, len(images), size)
    ]
    result: npt.NDArray[np.float64] = torch.cat(parts).cpu().numpy()
    return result


def _check(images: Tensor, dense: Tensor) -> None:
    if images.shape != dense.shape or images.dtype != torch.uint8 or dense.dtype != torch.uint8:
        raise EvaluationError(
            f"paired figures need uint8 images of one shape, got {images.dtype} "
            f"{tuple(images.shape)} and {dense.dtype} {tuple(dense.shape)}: were the dense images "
            "made under the same protocol?"
        )
