"""PrunerNet: starts with everything kept, learns through every parameter, flips gradually."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dipgo_core.pruner import GateLogits, PrunerNet, sampled, straight_through

ENCODERS = ("attention", "linear", "none")


def constant_pull(net: nn.Module, num_steps: int, learning_rate: float) -> list[int]:
    """Train on the mean of all gates alone; return how many gates flipped at each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=learning_rate)
    flips, before = [], net() >= 0.5
    for _ in range(num_steps):
        optimizer.zero_grad()
        straight_through(net()).mean().backward()
        optimizer.step()
        after = net() >= 0.5
        flips.append(int((before != after).sum()))
        before = after
    return flips


class SharedHead(nn.Module):
    """The counter-example: one head for all gates (METHOD section 2)."""

    def __init__(self, num_calls: int, num_gates: int, query_dim: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Parameter(torch.randn(num_calls - 1, num_gates, query_dim))
        self.head = nn.Sequential(nn.Linear(query_dim, 32), nn.GELU(), nn.Linear(32, 2))
        nn.init.zeros_(self.head[2].weight)
        self.head[2].bias.data = torch.tensor([0.0, 1.0])

    def forward(self) -> Tensor:
        return self.head(self.queries).softmax(-1)[..., 1]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_pruner_keeps_everything_at_the_start(encoder):
    keep = PrunerNet(4, 3, query_dim=16, encoder=encoder)()
    assert keep.shape == (4, 3)
    assert (keep[0] == 1).all()  # the first call is not predicted
    assert torch.allclose(keep[1:], torch.tensor(math.e / (1 + math.e)))  # softmax([0, 1])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_parameter_has_gradient_after_two_updates(encoder):
    net = PrunerNet(4, 3, query_dim=16, encoder=encoder)
    weights = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (straight_through(net()) * weights).sum().backward()
        optimizer.step()
    missing = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().max()]
    assert missing == []


def test_only_last_layer_has_gradient_at_the_first_step():
    net = PrunerNet(4, 3, query_dim=16)
    net().sum().backward()
    moved = {n for n, p in net.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert moved == {"heads.out_weight", "heads.out_bias"}


def test_attention_mixes_gates_of_different_calls():
    net = PrunerNet(4, 3, query_dim=16)
    nn.init.normal_(net.heads.out_weight)
    (gradient,) = torch.autograd.grad(net.logits()[0, 0, 0], net.queries)
    assert (gradient.abs().amax(-1) > 0).all()  # one gate reads the query of every other


def test_construction_is_seeded_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, two = PrunerNet(3, 2, query_dim=8, seed=1), PrunerNet(3, 2, query_dim=8, seed=1)
    assert torch.equal(torch.rand(1), expected)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.queries, PrunerNet(3, 2, query_dim=8, seed=2).queries)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_private_heads_flip_gates_gradually(encoder):
    flips = constant_pull(PrunerNet(10, 9, query_dim=64, encoder=encoder), 150, learning_rate=1.0)
    assert sum(flips) >= 60
    assert max(flips) <= 81 / 3


def test_shared_head_flips_nearly_all_gates_at_once():
    flips = constant_pull(SharedHead(10, 9, query_dim=64), 150, learning_rate=1.0)
    assert max(a + b for a, b in zip(flips, flips[1:], strict=False)) > 0.9 * 81


def test_straight_through_is_hard_forward_and_soft_backward():
    p = torch.tensor([0.2, 0.5, 0.9], requires_grad=True)
    gates = straight_through(p)
    gates.sum().backward()
    assert gates.tolist() == [0, 1, 1]
    assert p.grad is not None and p.grad.tolist() == [1, 1, 1]


@pytest.mark.parametrize("start", ["keep", "random", "uniform"])
def test_both_nets_begin_with_the_same_gates(start):
    nets = (
        PrunerNet(5, 3, query_dim=16, start=start, seed=4),
        GateLogits(5, 3, start=start, seed=4),
    )
    (one, other) = ((net() >= 0.5).tolist() for net in nets)
    assert one == other and all(one[0])
    kept = sum(map(sum, one[1:]))
    assert {"keep": kept == 12, "random": 0 < kept < 12, "uniform": kept == 6}[start]


def test_a_learning_rate_moves_logits_alike_whatever_their_number():
    """One step down the mean of the logits moves each by the rate."""
    for shape in ((3, 2), (9, 8)):
        net = GateLogits(*shape)
        (net.gain * net.weight).mean().backward()
        moved = net.gain * net.weight.grad
        assert torch.allclose(moved, torch.ones_like(moved))


def test_sampled_gates_are_kept_as_often_as_their_probability_says():
    p_keep = torch.tensor([[1.0, 1.0], [0.2, 0.9]]).requires_grad_()
    uniform = torch.linspace(0, 1, 1001)[1:-1]
    noise = torch.log(uniform / (1 - uniform))  # quantiles of the logistic distribution
    kept = torch.stack([sampled(p_keep, at.expand(1, 2)) >= 0.5 for at in noise]).float().mean(0)
    assert torch.allclose(kept, p_keep, atol=2e-3)
    sampled(p_keep, noise[:1].expand(1, 2)).sum().backward()
    assert bool(p_keep.grad.isfinite().all()) and bool((p_keep.grad > 0).all())
