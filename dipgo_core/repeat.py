"""What a skipped call repeats: the predicted noise, also where the denoiser predicts velocity.

Repeating v mixes the old latents in; repeating epsilon makes runs of skipped calls one DDIM jump.
Everything here is pure and differentiable.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dipgo_core.structures import Tensors


@dataclass(frozen=True, eq=False)
class Repeat:
    """How predictions are repeated under one noise scheduler.

    schedule: alpha-bar at each training timestep where predictions are velocities, else None.
    """

    schedule: Tensor | None
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def at(self, sample: Tensor, timestep: Any) -> RepeatAt:
        """Return how to repeat at one call: `sample` and `timestep` are what the denoiser gets."""
        if self.schedule is None:
            return RepeatAt(sample, None)
        device = sample.device
        if device not in self._copies:  # so that no call waits for the device
            self._copies[device] = self.schedule.to(device)
        return RepeatAt(sample, alpha_bar(self._copies[device], timestep))


@dataclass(frozen=True, eq=False)
class RepeatAt:
    """The two directions at one call; tensors behind the prediction stay as they are."""

    sample: Tensor
    alpha_bar: Tensor | None

    def repeatable(self, prediction: Tensors) -> Tensors:
        """Return what a later call can repeat of this call's prediction."""
        first = prediction[0]
        if self.alpha_bar is None or first is None:
            return prediction
        return (to_epsilon(first, self.sample, self.alpha_bar), *prediction[1:])

    def predictions(self, repeatable: Tensors) -> Tensors:
        """Return the prediction of this call that repeats an earlier one."""
        first = repeatable[0]
        if self.alpha_bar is None or first is None:
            return repeatable
        return (from_epsilon(first, self.sample, self.alpha_bar), *repeatable[1:])


def repeat_of(scheduler: Any) -> Repeat:
    """Return how predictions are repeated under a diffusers noise scheduler."""
    return Repeat(noise_schedule(scheduler))


def noise_schedule(scheduler: Any) -> Tensor | None:
    """Return alpha-bar at each training timestep where predictions are velocities, else None.

    None: a prediction is repeated as it is (epsilon, the clean sample, or a flow).
    """
    if scheduler.config.get("prediction_type") != "v_prediction":
        return None
    alphas: Tensor = scheduler.alphas_cumprod
    return alphas


def alpha_bar(schedule: Tensor, timestep: Any) -> Tensor:
    """Return alpha-bar at a timestep: a number, or a tensor of them, one an image.  # (1 or B,)

    Between whole timesteps sigma is interpolated linearly, as EulerDiscreteScheduler does.
    """
    timestep = torch.as_tensor(timestep, device=schedule.device).reshape(-1)
    if not timestep.is_floating_point():
        return schedule[timestep]
    low = timestep.floor().clamp(0, len(schedule) - 1)
    high = (low + 1).clamp(max=len(schedule) - 1)
    before, after = schedule[low.long()], schedule[high.long()]
    part = (timestep - low).to(schedule.dtype)
    sigma = torch.lerp((1 / before - 1).sqrt(), (1 / after - 1).sqrt(), part)
    return torch.where(part == 0, before, 1 / (1 + sigma**2))


def to_epsilon(prediction: Tensor, sample: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return sqrt(alpha-bar) v + sqrt(1 - alpha-bar) x, at least in float32.  # like prediction

    sample: what the denoiser was given, of unit variance; a learned variance behind v stays.
    alpha_bar: of one timestep, or one an image; a number or (1 or B,).
    """
    velocity, noisy, rest = _parts(prediction, sample)
    signal, noise = _roots(alpha_bar, velocity)
    return torch.cat([signal * velocity + noise * noisy, rest], dim=1)


def from_epsilon(epsilon: Tensor, sample: Tensor, alpha_bar: Tensor) -> Tensor:
    """Return the v that means `epsilon` at another sample and timestep, in the sample's dtype."""
    noise_now, noisy, rest = _parts(epsilon, sample)
    signal, noise = _roots(alpha_bar, noise_now)
    velocity = torch.cat([(noise_now - noise * noisy) / signal, rest], dim=1)
    return velocity.to(sample.dtype)


def _parts(prediction: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Split off channels without a counterpart: masks behind a sample, variances behind v."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    prediction, sample = prediction.to(wide), sample.to(wide)
    channels = min(prediction.shape[1], sample.shape[1])
    return prediction[:, :channels], sample[:, :channels], prediction[:, channels:]


def _roots(alpha_bar: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Roots in the schedule's own precision, as the noise schedulers take them."""
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    shape = (-1, *[1] * (like.ndim - 1))
    return signal.to(like).reshape(shape), noise.to(like).reshape(shape)
