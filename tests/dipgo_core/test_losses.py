"""Losses against closed forms and an SSIM written out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dipgo_core.config import LossSettings
from dipgo_core.losses import CONSISTENCY, consistency_loss, sparsity_loss, ssim_loss, total_loss


def images(seed: int, size: int = 32) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def ssim_by_hand(a: Tensor, b: Tensor) -> Tensor:
    """Wang et al. 2004, windows wholly inside the image: the independent oracle."""
    grid = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(grid**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    patches = [x.double().unfold(2, 11, 1).unfold(3, 11, 1) for x in (a, b)]
    (mu_a, mu_b) = ((p * window).sum((-1, -2)) for p in patches)
    var_a, var_b = (
        (p**2 * window).sum((-1, -2)) - m**2 for p, m in zip(patches, (mu_a, mu_b), strict=True)
    )
    cov = (patches[0] * patches[1] * window).sum((-1, -2)) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mu_a * mu_b + c1) * (2 * cov + c2)
    return (top / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))).mean()


def test_ssim_loss_equals_the_formula_on_small_images():
    a = images(0)
    b = (a + 0.2 * images(1)).clamp(0, 1)
    assert ssim_loss(a, b).item() == pytest.approx(1 - ssim_by_hand(a, b).item(), abs=1e-4)


@pytest.mark.parametrize("name", sorted(CONSISTENCY))
def test_consistency_is_zero_at_the_reference_and_has_gradient_beside_it(name):
    full = images(0)
    pruned = (full + 0.1 * images(2)).requires_grad_()
    assert consistency_loss(full, full, {name: 1.0}).item() == pytest.approx(0, abs=1e-6)
    (gradient,) = torch.autograd.grad(consistency_loss(pruned, full, {name: 1.0}), pruned)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


def test_consistency_is_computed_in_float32_for_half_images():
    half = images(0).half()
    assert consistency_loss(half, half, {"l2": 1.0}).dtype is torch.float32


def test_consistency_adds_weighted_terms():
    a, b = images(0), images(1)
    mixed = consistency_loss(a, b, {"l1": 2.0, "l2": 0.5, "ssim": 0.0})
    expected = 2 * (a - b).abs().mean() + 0.5 * (a - b).pow(2).mean()
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-6)


def test_sparsity_is_one_at_the_start_and_weighs_by_gamma():
    gamma = torch.tensor([0.1, 0.3])
    assert sparsity_loss(torch.ones(5, 2), gamma).item() == pytest.approx(1)
    gates = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert sparsity_loss(gates, gamma).item() == pytest.approx((0.4 + 0.1) / (2 * 0.4))


@pytest.mark.parametrize(("ratio", "counted"), [(0.21, True), (0.2, False), (0.1, False)])
def test_total_drops_sparsity_at_and_below_tau(ratio, counted):
    a, b = images(0), images(1)
    gates, gamma = torch.ones(3, 2), torch.ones(2)
    settings = LossSettings(consistency={"l1": 1.0}, alpha=0.5, tau=0.2)
    loss = total_loss(a, b, gates, gamma, compute_ratio=ratio, settings=settings)
    expected = (a - b).abs().mean().item() + (0.5 if counted else 0.0)
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
