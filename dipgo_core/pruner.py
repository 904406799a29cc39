"""PrunerNet: learnable queries -> encoder -> private heads -> p_reuse and p_keep of every gate.

Source: arXiv 2410.16942, section 3 (pruner network).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dipgo_core.config import Encoder, Start

#: Hidden width of a head, as a share of the query's: heads are private, so they must stay small.
HEAD_SHARE = 16
#: Probabilities nearer to 0 or 1 are not told apart: their logits are not finite in float32.
SURE = 1e-6


class PrunerNet(nn.Module):
    """Predicts the gates of all calls but the first, which is always computed.

    The first call is left out rather than predicted and overruled: every parameter then takes
    part in the loss. Gates are the searched ones only (``BlockGraph.searched``). At construction
    p_keep is softmax([0, 1]) = 0.73 where `start` keeps a gate (the paper keeps all), else 0.27.

    Differs from the released code: the encoder is live (there its output is dropped).
    """

    def __init__(
        self,
        num_calls: int,
        num_gates: int,
        *,
        query_dim: int = 512,
        encoder: Encoder = "attention",
        start: Start = "keep",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.shape = (num_calls - 1, num_gates)
        with torch.random.fork_rng(devices=[]):  # seeded, and the global generator untouched
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.randn(*self.shape, query_dim))
            self.encoder = _build_encoder(encoder, query_dim)
            self.heads = PrivateHeads(self.shape, query_dim)
        kept = first_gates(start, self.shape, seed).float()
        self.heads.out_bias.data = torch.stack([1 - kept, kept], dim=-1)

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


class GateLogits(nn.Module):
    """p_keep of all calls but the first, each by a logit of its own; begins like `PrunerNet`.

    A loss that is a sum over calls ties no two gates together, so there is nothing that a network
    over them could learn. Weights are logits over the root of their number, so that a learning
    rate means as much at any number of gates although the sparsity term is a mean over them.
    """

    def __init__(
        self, num_calls: int, num_gates: int, *, start: Start = "keep", seed: int = 0
    ) -> None:
        super().__init__()
        shape = (num_calls - 1, num_gates)
        self.gain = (shape[0] * shape[1]) ** 0.5
        kept = first_gates(start, shape, seed).float()
        self.weight = nn.Parameter((2 * kept - 1) / self.gain)

    def forward(self) -> Tensor:
        """Return p_keep; row 0 is the first call, constant 1.  # (T, S)"""
        keep = (self.gain * self.weight).sigmoid()
        return torch.cat([keep.new_ones(1, keep.shape[1]), keep])


def first_gates(start: Start, shape: tuple[int, int], seed: int) -> Tensor:
    """Return which gates a search begins with kept, of all calls but the first.  # (T - 1, S)"""
    if start == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    kept = torch.ones(shape, dtype=torch.bool)
    if start == "uniform":
        kept[::2] = False  # calls 1, 3, 5, ...
    return kept


def straight_through(p_keep: Tensor) -> Tensor:
    """Return gates that are 0 or 1 forward (arg-max) and have the softmax's gradient backward."""
    hard = (p_keep >= 0.5).to(p_keep.dtype)
    return hard + (p_keep - p_keep.detach())


def sampled(p_keep: Tensor, noise: Tensor) -> Tensor:
    """Return the probabilities under logistic noise: 0.5 or more as often as p_keep says.

    Gumbel-softmax of two classes at temperature 1 (Jang et al. 2017): the difference of two Gumbel
    variables is logistic. The first row, of the call that is always computed, stays as it is.
    noise: (T - 1, S).
    """
    drawn = (torch.logit(p_keep[1:], eps=SURE) + noise).sigmoid()
    return torch.cat([p_keep[:1], drawn])


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
