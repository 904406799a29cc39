"""The bundled trained models, their captions, and the statistics of the real images.

Importing this package loads neither torch nor diffusers; the folders it names load with the stock
``from_pretrained``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from dipgo_core.errors import UnknownModelError

ZooModel = Literal["tiny-sd", "tiny-dit", "tiny-clip", "tiny-features"]
Split = Literal["calibration", "test"]

ZOO_MODELS: Final[tuple[ZooModel, ...]] = ("tiny-sd", "tiny-dit", "tiny-clip", "tiny-features")

_ROOT: Final = Path(__file__).parent


def zoo_path(name: str) -> Path:
    """Returns the folder of a bundled model, ready for ``from_pretrained``.

    Raises:
        UnknownModelError: if no bundled model has this name.
    """
    if name not in ZOO_MODELS:
        raise UnknownModelError(
            f"no bundled model is called {name!r}; the bundled models are {', '.join(ZOO_MODELS)}"
        )
    return _ROOT / "weights" / name


def captions(split: Split) -> tuple[str, ...]:
    """Returns the captions of one split: 180 for ``calibration``, 100 for ``test``, disjoint."""
    if split not in ("calibration", "test"):
        raise ValueError(f"split must be 'calibration' or 'test', got {split!r}")
    return tuple((_ROOT / "captions" / f"{split}.txt").read_text("utf-8").splitlines())


def reference_statistics_path() -> Path:
    """Returns the safetensors file with the features of the 10,000 held-out real images."""
    return _ROOT / "reference" / "features.safetensors"
