"""One image file of a reference: its pixels, and whether it can be read at all. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from dipgo_core.errors import EvaluationError

#: What Pillow raises for files that are torn, of no known format, or far too large once unpacked.
_UNREADABLE: Final = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_JPEG: Final = ("JPEG", "MPO")
_JPEG_END: Final = b"\xff\xd9"
_TAIL_BYTES: Final = 4096  # some cameras write a little after the end


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Return an image as torch-fidelity reads it.  # (H, W, 3)

    Raises:
        EvaluationError: it cannot be read.
    """
    with _readable(path), Image.open(path) as image:
        return np.array(image.convert("RGB"))


def check_image(path: Path) -> None:
    """Check that an image is whole: a PNG by its checksums, a JPEG by its end; others are decoded.

    Raises:
        EvaluationError: it cannot be read.
    """
    with _readable(path):
        stat = path.stat()
    _check(path, stat.st_mtime_ns, stat.st_size)


@cache
def _check(path: Path, _changed_ns: int, _size: int) -> None:
    """Check a file once for each state that it is in."""
    with _readable(path), Image.open(path) as image:
        image.verify()
        told = image.format
    if told != "PNG" and not (told in _JPEG and _JPEG_END in _tail(path)):
        read_image(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except _UNREADABLE as error:
        raise EvaluationError(f"cannot read the reference image {path}: {error}") from error


def _tail(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        return stream.read()
