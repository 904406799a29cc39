"""Published PyTorch files: read as tensors and nothing else."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dipgo_core.errors import ModelFilesError


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the named tensors of a state dict file; anything else in it is refused unread.

    Raises:
        ModelFilesError: the file is missing, torn, or holds more than tensors.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torn archives fail in many ways
        raise ModelFilesError(
            f"{path} cannot be read as tensors ({_first_line(error)}): it may be truncated, copy "
            "it again"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ModelFilesError(f"{path} is no state dict: it must map names to tensors")
    return state


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
