"""Align-Your-Steps: timesteps optimised for a noise schedule, at any number of steps. No torch."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

#: What diffusers 0.42 ships as ``AysSchedules``, 10 steps each.
SD_TIMESTEPS: Final = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24)
SDXL_TIMESTEPS: Final = (999, 845, 730, 587, 443, 310, 193, 116, 53, 13)

#: Stable Diffusion's noise schedule, `scaled_linear`, which both lists are for.
_BETAS: Final = (0.00085, 0.012)
_TRAINED: Final = 1000


def resampled(timesteps: tuple[int, ...], steps: int) -> tuple[int, ...] | None:
    """Return the list at another number of steps, None where two of its timesteps would be one.

    The logarithm of the amount of noise is interpolated linearly over the share of steps done, from
    the first timestep to timestep 0 (arXiv 2404.14507, section 4: the paper's way to other numbers
    of steps).
    """
    if steps == len(timesteps):
        return timesteps
    noise = _log_noise()
    known = noise[[*timesteps, 0]]
    wanted = np.interp(np.linspace(0, 1, steps + 1), np.linspace(0, 1, len(known)), known)[:-1]
    found = np.interp(wanted, noise, np.arange(_TRAINED)).round().astype(int)
    return tuple(found.tolist()) if (np.diff(found) < 0).all() else None


def _log_noise() -> npt.NDArray[np.float64]:
    """Return log sigma of every timestep, rising.  # (1000,)"""
    first, last = np.sqrt(_BETAS)
    kept = np.cumprod(1 - np.linspace(first, last, _TRAINED) ** 2)
    return np.asarray(np.log((1 - kept) / kept) / 2)
