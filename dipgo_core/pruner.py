"""PrunerNet: learnable queries -> encoder -> private heads -> p_reuse and p_keep of every gate.

Source: arXiv 2410.16942, section 3 (pruner network).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dipgo_core.config import Encoder

#: Hidden width of a head, as a share of the query's: heads are private, so they must stay small.
HEAD_SHARE = 16


class PrunerNet(nn.Module):
    """Predicts the gates of all calls but the first, which is always computed.

    The first call is left out rather than predicted and overruled: every parameter then takes
    part in the loss. Gates are the searched ones only (``BlockGraph.searched``). At construction
    every p_keep is softmax([0, 1]) = 0.73, so all gates are kept.

    Differs from the released code: the encoder is live (there its output is dropped).
    """

    def __init__(
        self,
        num_calls: int,
        num_gates: int,
        *,
        query_dim: int = 512,
        encoder: Encoder = "attention",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = (num_calls - 1, num_gates)
        with torch.random.fork_rng(devices=[]):  # seeded, and the global generator untouched
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.randn(*self.shape, query_dim))
            self.encoder = _build_encoder(encoder, query_dim)
            self.heads = PrivateHeads(self.shape, query_dim)

    def logits(self) -> Tensor:
        """Return the logits of [reuse, keep].  # (T - 1, S, 2)"""
        tokens = self.queries.flatten(0, 1)[None]  # (1, (T - 1) S, D): within and across calls
        encoded: Tensor = self.encoder(tokens)[0].view_as(self.queries)
        out: Tensor = self.heads(encoded)
        return out

    def forward(self) -> Tensor:
        """Return p_keep; row 0 is the first call, constant 1.  # (T, S)"""
        keep = self.logits().softmax(dim=-1)[..., 1]
        return torch.cat([keep.new_ones(1, keep.shape[1]), keep])


class PrivateHeads(nn.Module):
    """One two-layer perceptron a gate; the last layer starts at weight 0, bias [0, 1]."""

    def __init__(self, shape: tuple[int, int], query_dim: int) -> None:
        super().__init__()
        hidden = max(8, query_dim // HEAD_SHARE)
        self.weight = nn.Parameter(torch.randn(*shape, query_dim, hidden) * query_dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(*shape, hidden))
        self.out_weight = nn.Parameter(torch.zeros(*shape, hidden, 2))
        self.out_bias = nn.Parameter(torch.tensor([0.0, 1.0]).repeat(*shape, 1))

    def forward(self, encoded: Tensor) -> Tensor:
        hidden = torch.einsum("tnd,tndh->tnh", encoded, self.weight) + self.bias
        hidden = nn.functional.gelu(hidden)
        return torch.einsum("tnh,tnho->tno", hidden, self.out_weight) + self.out_bias


def straight_through(p_keep: Tensor) -> Tensor:
    """Return gates that are 0 or 1 forward (arg-max) and have the softmax's gradient backward."""
    hard = (p_keep >= 0.5).to(p_keep.dtype)
    return hard + (p_keep - p_keep.detach())


def _build_encoder(kind: Encoder, query_dim: int) -> nn.Module:
    """One layer: self-attention over all gates of all calls, a linear layer, or nothing."""
    if kind == "none":
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(query_dim, query_dim)
    return nn.TransformerEncoderLayer(
        query_dim,
        nhead=8 if query_dim % 8 == 0 else 1,
        dim_feedforward=2 * query_dim,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
