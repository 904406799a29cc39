"""Shrunk models: pipelines of the real classes and topologies with tiny widths and seeded weights.

What `make rehearse` and tests run instead of downloads: every block, layer, encoder and config
switch that decides a code path is that of the published model; widths, depths inside a layer (text
encoders, the transformers in SDXL's attention stacks) and weights are not. `flux-short` has fewer
blocks, for tests.
Importing this package loads neither torch nor diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Final

from dipgo_core.errors import UnknownModelError, nearest

#: The side of the images that they are for. PixArt and FLUX do not say so themselves, and make 1024
#: pixels unless asked: give `ModelSettings.resolution`.
PIXELS: Final = 64

#: The file of this package and the function in it that builds each model.
SHRUNK: Final[dict[str, tuple[str, str]]] = {
    "sd15": ("sd", "build_sd15"),
    "sd21": ("sd", "build_sd21"),
    "sdxl": ("sdxl", "build_sdxl"),
    "dit": ("dit", "build_dit"),
    "pixart": ("pixart", "build_pixart"),
    "pixart-sigma": ("pixart", "build_pixart_sigma"),
    "sd3": ("sd3", "build_sd3"),
    "sd35": ("sd3", "build_sd35"),
    "flux": ("flux", "build_flux"),
    "flux-short": ("flux", "build_flux_short"),
}


def build(name: str) -> Any:
    """Return a shrunk model's diffusers pipeline, in float32; the same weights every time.

    Raises:
        UnknownModelError: no shrunk model has this name.
    """
    if name not in SHRUNK:
        raise UnknownModelError(
            f"no shrunk model is called {name!r}; there are {', '.join(SHRUNK)}."
            f"{nearest(name, list(SHRUNK))}"
        )
    module, function = SHRUNK[name]
    found: Callable[[], Any] = getattr(import_module(f"{__name__}.{module}"), function)
    return found()


def write(name: str, folder: Path) -> Path:
    """Save a shrunk model as `save_pretrained` does, in safetensors; return the folder."""
    build(name).save_pretrained(folder)
    return folder
