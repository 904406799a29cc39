"""One training loop for all the bundled models: AdamW, warm-up, cosine, averaged weights."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

logger = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class TrainingPlan:
    """What a training is run with; the learning rate warms up, then falls as a cosine to 0."""

    steps: int
    batch_size: int
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 1e-2
    ema_decay: float = 0.999
    export_every: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Progress(Generic[M]):
    """One optimiser step; ``averaged`` is the running mean of the weights, the model to ship."""

    step: int
    loss: float
    averaged: M


def fit(
    model: M, draw_loss: Callable[[], torch.Tensor], plan: TrainingPlan
) -> Iterator[Progress[M]]:
    """Minimises ``draw_loss`` over the parameters of ``model``, one step a turn."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True
    )
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: _warm_cosine(i, plan))
    averaged = AveragedModel(model, multi_avg_fn=_moving_average(plan.ema_decay))
    for step in range(1, plan.steps + 1):
        loss = draw_loss()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_schedule.step()
        averaged.update_parameters(model)
        yield Progress(step, loss.item(), cast(M, averaged.module))


def _warm_cosine(step: int, plan: TrainingPlan) -> float:
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    progress = (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _moving_average(decay: float) -> Callable[..., None]:
    def update(averaged: list[torch.Tensor], current: list[torch.Tensor], count: int) -> None:
        rate = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        with torch.no_grad():
            for mean, value in zip(averaged, current, strict=True):
                mean.lerp_(value, rate)

    return update


def follow(
    name: str, steps: Iterator[Progress[M]], plan: TrainingPlan, export: Callable[[M], None]
) -> None:
    """Runs a training to its end, logging the mean loss and exporting now and then."""
    started, losses = time.monotonic(), list[float]()
    for progress in steps:
        losses.append(progress.loss)
        if progress.step % 50 == 0 or progress.step == 3:
            per_step = (time.monotonic() - started) / progress.step
            mean = sum(losses) / len(losses)
            logger.info("%s %d loss %.4f (%.3f s/step)", name, progress.step, mean, per_step)
            losses.clear()
        if progress.step % plan.export_every == 0 or progress.step in (500, plan.steps):
            export(progress.averaged)
