"""Repeat: epsilon and v are the same prediction told in two ways."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from tiny import tiny_scheduler
from torch import Tensor

from dipgo_core.repeat import alpha_bar, from_epsilon, noise_schedule, repeat_of, to_epsilon


def pair(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 4, 3, 3, generator=generator).to(dtype) for _ in range(2))
    return clean, noise


@pytest.mark.parametrize("timestep", [1, 500, 999, torch.tensor([3, 700])])
def test_epsilon_of_the_velocity_is_the_noise(timestep: Any) -> None:
    """Oracle: diffusers' own `add_noise` and `get_velocity`."""
    scheduler = tiny_scheduler(prediction_type="v_prediction")
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    clean, noise = pair()
    steps = torch.as_tensor(timestep).expand(2)
    noisy = scheduler.add_noise(clean, noise, steps)
    velocity = scheduler.get_velocity(clean, noise, steps)
    alpha = alpha_bar(scheduler.alphas_cumprod, timestep)
    assert torch.allclose(to_epsilon(velocity, noisy, alpha), noise, atol=1e-12)
    assert torch.allclose(from_epsilon(noise, noisy, alpha), velocity, atol=1e-9)


def test_alpha_bar_between_timesteps_is_that_of_euler() -> None:
    """Oracle: the sigmas of EulerDiscreteScheduler at fractional timesteps."""
    euler = diffusers.EulerDiscreteScheduler.from_config(tiny_scheduler().config)
    euler.set_timesteps(7, device="cpu")
    found = torch.cat([alpha_bar(euler.alphas_cumprod, t) for t in euler.timesteps])
    assert any(t != int(t) for t in euler.timesteps.tolist())
    assert torch.allclose(found, 1 / (euler.sigmas[:-1] ** 2 + 1), rtol=1e-4)


def test_a_repeated_velocity_means_the_same_noise_elsewhere() -> None:
    scheduler = tiny_scheduler(prediction_type="v_prediction")
    repeat = repeat_of(scheduler)
    first, second = pair()
    here, there = repeat.at(first, 801), repeat.at(second, torch.tensor(601))
    cached = here.repeatable((first * 2, None))
    again = there.predictions(cached)
    assert again[1] is None
    assert torch.allclose(to_epsilon(again[0], second, there.alpha_bar), cached[0], atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
def test_other_predictions_are_repeated_as_they_are(kind: str) -> None:
    repeat = repeat_of(tiny_scheduler(prediction_type=kind)).at(*pair())
    prediction = (torch.ones(1),)
    assert repeat.predictions(repeat.repeatable(prediction)) is prediction
    assert noise_schedule(diffusers.FlowMatchEulerDiscreteScheduler()) is None


def test_masks_behind_the_sample_and_variances_behind_v_are_left_alone() -> None:
    sample, prediction = torch.randn(1, 9, 2, 2), torch.randn(1, 6, 2, 2)
    alpha = torch.tensor(0.3)
    for channels in (4, 9):
        noise = to_epsilon(prediction, sample[:, :channels], alpha)
        kept = min(channels, 6)
        assert torch.equal(noise[:, kept:], prediction[:, kept:])
        assert torch.allclose(from_epsilon(noise, sample[:, :channels], alpha), prediction)


def test_half_precision_is_repeated_in_single_precision() -> None:
    sample, prediction = pair(torch.float16)
    noise = to_epsilon(prediction, sample, torch.tensor(0.0047))
    assert noise.dtype == torch.float32
    assert from_epsilon(noise, sample, torch.tensor(0.0047)).dtype == torch.float16


def test_both_ways_are_differentiable() -> None:
    sample, prediction = (tensor[:1, :1, :1].requires_grad_() for tensor in pair())
    alpha = torch.tensor(0.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p, s: to_epsilon(p, s, alpha), (prediction, sample))
    assert torch.autograd.gradcheck(lambda p, s: from_epsilon(p, s, alpha), (prediction, sample))
