"""Align-Your-Steps: diffusers' lists, and other numbers of steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.schedulers import AysSchedules

from dipgo_core.families.ays import SD_TIMESTEPS, SDXL_TIMESTEPS, resampled

LISTS = {"StableDiffusion": SD_TIMESTEPS, "StableDiffusionXL": SDXL_TIMESTEPS}


def sigmas() -> torch.Tensor:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    kept = scheduler.alphas_cumprod.double()
    return ((1 - kept) / kept).sqrt()


@pytest.mark.parametrize("name", LISTS)
def test_ten_steps_are_the_lists_of_diffusers(name: str) -> None:
    assert list(LISTS[name]) == AysSchedules[f"{name}Timesteps"]
    assert resampled(LISTS[name], 10) == LISTS[name]


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("steps", [2, 5, 7, 20, 35])
def test_other_numbers_of_steps_interpolate_the_logarithm_of_the_noise(
    name: str, steps: int
) -> None:
    """Oracle: the authors' interpolation over the published sigmas, whose last one is 0.029."""
    known = np.log([*AysSchedules[f"{name}Sigmas"][:-1], 0.029])
    at = np.linspace(0, 1, steps + 1)
    expected = np.interp(at, np.linspace(0, 1, 11), known)[:-1]
    found = resampled(LISTS[name], steps)
    assert found is not None and len(found) == steps
    nearest = [int((sigmas().log() - value).abs().argmin()) for value in expected]
    assert np.abs(np.array(found) - nearest).max() <= 3  # the published sigmas are rounded


def test_is_none_where_two_timesteps_would_be_one() -> None:
    assert resampled(SD_TIMESTEPS, 500) is None
