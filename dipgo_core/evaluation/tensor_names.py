"""Which tensors a published file names, without loading any: no object in it is made. No torch."""

from __future__ import annotations

import io
import pickletools
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from dipgo_core.errors import ModelFilesError

#: What a file of before 2020, no zip, begins with; its names lie in the fourth part.
_MAGIC: Final = 0x1950A86A20F9469CFC6C
_PARTS: Final = 4
_HEAD_BYTES: Final = 8_000_000  # of such a file; the tensors' bytes come after the names

#: What torn files raise: the zip and its parts fail in many ways.
_TORN: Final = (
    OSError,
    ValueError,
    LookupError,
    RuntimeError,
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
)


def check_tensors(paths: Sequence[Path], wanted: Iterable[str], network: str) -> None:
    """Check that a file, or its shards, name all tensors that a network reads from them.

    Raises:
        ModelFilesError: it is torn, of another format, or lacks some; says which.
    """
    lacking = sorted(set(wanted).difference(*map(tensor_names, paths)))
    if lacking:
        raise ModelFilesError(
            f"{paths[0]} lacks {len(lacking)} of the tensors of {network}, such as {lacking[0]}: "
            "it is another network, or damaged; copy the right file there"
        )


def tensor_names(path: Path) -> frozenset[str]:
    """Return the names in a safetensors file, or all texts in a PyTorch one, which has them too.

    Raises:
        ModelFilesError: it cannot be read.
    """
    read = _of_safetensors if path.suffix == ".safetensors" else _of_archive
    try:
        return frozenset(read(path))
    except _TORN as error:
        raise ModelFilesError(
            f"{path} cannot be read ({error}): it may be truncated, copy it again"
        ) from error


def _of_safetensors(path: Path) -> Iterable[str]:
    with safe_open(path, framework="numpy") as file:
        return list(file.keys())


def _of_archive(path: Path) -> Iterable[str]:
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        if not head.startswith(b"PK"):
            return _of_old_archive(io.BytesIO(head))
        with zipfile.ZipFile(stream) as archive:
            found = [n for n in archive.namelist() if n.rpartition("/")[2] == "data.pkl"]
            if not found:
                raise ValueError("no tensors in this zip")
            return _texts(io.BytesIO(archive.read(found[0])))


def _of_old_archive(stream: io.BytesIO) -> Iterable[str]:
    first = [argument for _, argument, _ in pickletools.genops(stream)]
    if _MAGIC not in first:
        raise ValueError("not a file that PyTorch wrote")
    parts = [_texts(stream) for _ in range(_PARTS - 1)]
    return parts[-1]


def _texts(stream: io.BytesIO) -> list[str]:
    """Take a description of objects apart into its texts; nothing of it is carried out."""
    return [text for _, text, _ in pickletools.genops(stream) if isinstance(text, str)]
