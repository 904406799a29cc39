"""Consistency and sparsity losses (DiP-GO, arXiv 2410.16942, section 3). Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dipgo_core.config import LossSettings


def ssim_loss(pruned: Tensor, full: Tensor) -> Tensor:
    """Return 1 - SSIM of images (B, 3, H, W) in [0, 1], averaged over the batch, in float32.

    Gaussian window of 11 pixels, sigma 1.5 (the SSIM paper's), also for 32-pixel images; both
    sides need at least 11 pixels.
    """
    similarity = structural_similarity_index_measure(pruned.float(), full.float(), data_range=1.0)
    assert isinstance(similarity, Tensor)
    return 1 - similarity


def l1_loss(pruned: Tensor, full: Tensor) -> Tensor:
    return (pruned.float() - full.float()).abs().mean()


def l2_loss(pruned: Tensor, full: Tensor) -> Tensor:
    return (pruned.float() - full.float()).square().mean()


CONSISTENCY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ssim": ssim_loss,
    "l1": l1_loss,
    "l2": l2_loss,
}


def consistency_loss(pruned: Tensor, full: Tensor, weights: Mapping[str, float]) -> Tensor:
    """Return the weighted sum of the named losses between decoded images (B, 3, H, W)."""
    terms = [w * CONSISTENCY[name](pruned, full) for name, w in weights.items() if w]
    return torch.stack(terms).sum()


def sparsity_loss(gates: Tensor, gamma: Tensor) -> Tensor:
    """Return the gamma-weighted share of kept gates: 1 while everything is kept.

    gates: (T, S), the unforced ones (a dead block's gate counts as the pruner set it).
    gamma: (S,), share of a dense call each gate saves, or ones.

    Differs from the paper: the sum is divided by T * sum(gamma), where the paper prints 1 / (N T)
    and the released code divides by T. So alpha means the same at every N, T and gamma; relative to
    the paper the term is N / sum(gamma) times larger, and to the released code sum(gamma) times
    smaller, and a learning rate taken from either scales accordingly.
    """
    return (gates * gamma).sum() / (len(gates) * gamma.sum())


@dataclass(frozen=True, eq=False)
class Loss:
    """The total and its two terms; total is what is minimised."""

    total: Tensor
    consistency: Tensor
    sparsity: Tensor


def total_loss(
    pruned: Tensor,
    full: Tensor,
    gates: Tensor,
    gamma: Tensor,
    *,
    compute_ratio: float,
    settings: LossSettings,
) -> Loss:
    """Return consistency + alpha * sparsity while compute_ratio > tau, then consistency alone.

    compute_ratio: kept share of the dense MACs with the gates as they are now, closure included.
    """
    consistency = consistency_loss(pruned, full, settings.consistency)
    sparsity = sparsity_loss(gates, gamma)
    total = consistency
    if compute_ratio > settings.tau:
        total = total + settings.alpha * sparsity
    return Loss(total, consistency, sparsity)
