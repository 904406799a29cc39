"""Calibration items of a search: which ones a step draws, and the dense model's latents."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from dipgo_core.config import SearchSettings
from dipgo_core.errors import SearchError
from dipgo_core.sampling import Batch, noise_scheduler, rollout
from dipgo_core.search.progress import SearchProblem


def check_problem(problem: SearchProblem) -> None:
    """Raise SearchError unless every item has its seed and latent, and a batch its equal parts."""
    lengths = {"items": len(problem.items), "seeds": len(problem.seeds)}
    if problem.dense_latents is not None:
        lengths["dense_latents"] = len(problem.dense_latents)
    if len(set(lengths.values())) != 1 or not problem.items:
        counts = ", ".join(f"{n} {name}" for name, n in lengths.items())
        raise SearchError(f"a search needs as many seeds and latents as items, got {counts}")
    size, part = problem.settings.batch_size, problem.images_at_once
    if part is not None and (part < 1 or size % part):
        raise SearchError(
            f"search.batch_size {size} cannot be split into equal parts of {part} images: choose a "
            "divisor"
        )


def draw_items(settings: SearchSettings, search_step: int, num_items: int) -> list[list[int]]:
    """Return indices of calibration items, one list a batch, from seed and step alone."""
    generator = np.random.default_rng([settings.seed, search_step])
    wanted = settings.batch_size * settings.accumulation
    drawn = generator.choice(num_items, wanted, replace=wanted > num_items)
    return [list(map(int, part)) for part in np.split(drawn, settings.accumulation)]


def batch_of(problem: SearchProblem, chosen: Iterable[int]) -> Batch:
    """Return the calibration items of these indices, with their seeds."""
    indices = list(chosen)
    return Batch(tuple(problem.items[i] for i in indices), tuple(problem.seeds[i] for i in indices))


def dense_latents(problem: SearchProblem) -> tuple[Tensor, int]:
    """Return what the dense model's runs decode (n, C, h, w), and the forwards spent on it."""
    if problem.dense_latents is not None:
        return problem.dense_latents, 0
    size, done = problem.settings.batch_size, []
    with torch.no_grad():
        for start in range(0, len(problem.items), size):
            chosen = range(start, min(start + size, len(problem.items)))
            done.append(rollout(problem.model, batch_of(problem, chosen), problem.sampler))
    num_calls = len(noise_scheduler(problem.model, problem.sampler).timesteps)
    return torch.cat(done), num_calls * len(done)
