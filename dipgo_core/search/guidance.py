"""How the guided prediction is made of what the denoiser gives: learned from one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Guidance:
    """How the parts of a batch make up the guided prediction, which is linear in them.

    weights: (P,), one a part. channels: those that the noise scheduler takes (a learned variance
    behind them goes nowhere).
    """

    weights: Tensor
    channels: int

    def of(self, change: Tensor) -> Tensor:
        """Return a change of the guided prediction, in float32.  # (P B, C, ...) -> (B, n)"""
        parts = _parts(change[:, : self.channels], len(change) // len(self.weights))
        return torch.einsum("p,pbn->bn", self.weights, parts.flatten(2))


def learned_guidance(prediction: Tensor, guided: Tensor, size: int) -> Guidance:
    """Learn from one call how the guided prediction is made, by least squares.

    prediction: (P B, C, ...), what the denoiser gave. guided: what the noise scheduler got; where
    it comes once a part (DiT), its first `size` images.
    """
    parts = _parts(prediction, size)
    channels = min(parts.shape[2], guided.shape[1])
    columns = parts[:, :, :channels].flatten(1).T  # (n, P)
    wanted = guided[:size, :channels].float().reshape(-1, 1)
    solution: Tensor = torch.linalg.lstsq(columns.cpu(), wanted.cpu()).solution[:, 0]
    return Guidance(solution.to(prediction.device), channels)


def _parts(prediction: Tensor, size: int) -> Tensor:
    """Return what guidance puts together, part by part.  # (P B, C, ...) -> (P, B, C, n)"""
    return prediction.float().reshape(-1, size, prediction.shape[1], prediction[0, 0].numel())
