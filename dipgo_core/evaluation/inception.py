"""Inception weights as safetensors: converted once from the archive, then read from the copy."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.inception_files import (
    SOURCE_SHA256,
    InceptionFiles,
    checked_inception,
)
from dipgo_core.evaluation.published import read_tensors

logger = logging.getLogger(__name__)


def inception_state(name: str) -> dict[str, Tensor]:
    """Return the weights behind "inception-v3-compat" or "inception-v3-compat:FILE".

    Converts the archive the first time; several processes may do so at once.

    Raises:
        ModelFilesError: the file is missing, truncated, not the published one, or holds more than
            tensors.
    """
    files = checked_inception(name)
    if not files.converted.is_file():
        convert(files)
    state: dict[str, Tensor] = load_file(files.converted)
    return state


def convert(files: InceptionFiles) -> None:
    """Write the safetensors copy of an archive, under a temporary name first.

    Raises:
        ModelFilesError: the archive cannot be read as tensors, or the copy cannot be written.
    """
    tensors = {key: value.contiguous() for key, value in read_tensors(files.original).items()}
    target = files.converted
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".convert-") as folder:
            temporary = Path(folder) / target.name
            save_file(tensors, temporary, metadata={SOURCE_SHA256: files.digest})
            temporary.replace(target)
    except OSError as error:
        raise ModelFilesError(
            f"cannot write the converted Inception weights {target} ({error.strerror}): make room, "
            "or set XDG_CACHE_HOME to a folder that can be written"
        ) from error
    logger.info("converted %s to %s", files.original, target)
