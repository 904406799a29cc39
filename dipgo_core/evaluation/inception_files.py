"""The Inception network behind FID: its published file, where its safe copy lies. No torch.

The published weights are a PyTorch archive. It is read once, as tensors and nothing else
(`inception.convert`); from then on only the safetensors copy in the user's cache is.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.lpips_files import torch_hub_folder
from dipgo_core.evaluation.tensor_names import check_tensors
from dipgo_core.model_files import file_sha256

INCEPTION: Final = "inception-v3-compat"

#: The file torch-fidelity publishes.
INCEPTION_FILE: Final = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256: Final = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_BYTES: Final = 95_628_359
INCEPTION_URL: Final = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)

#: Where a converted file tells the SHA-256 of the archive it was made from.
SOURCE_SHA256: Final = "source_sha256"


_PAIR: Final = ("branch1x1", "branch_pool")
_DOUBLE: Final = ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3")
_A: Final = (*_PAIR, "branch5x5_1", "branch5x5_2", *_DOUBLE)
_B: Final = ("branch3x3", *_DOUBLE)
_C: Final = (
    *_PAIR,
    *(f"branch7x7_{i}" for i in range(1, 4)),
    *(f"branch7x7dbl_{i}" for i in range(1, 6)),
)
_D: Final = ("branch3x3_1", "branch3x3_2", *(f"branch7x7x3_{i}" for i in range(1, 5)))
_E: Final = (
    *_PAIR,
    *("branch3x3_1", "branch3x3_2a", "branch3x3_2b"),
    *("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a", "branch3x3dbl_3b"),
)
#: The blocks of the network and their branches, as torch-fidelity names them.
_BLOCKS: Final = {
    **{f"Mixed_5{i}": _A for i in "bcd"},
    "Mixed_6a": _B,
    **{f"Mixed_6{i}": _C for i in "bcde"},
    "Mixed_7a": _D,
    **{f"Mixed_7{i}": _E for i in "bc"},
}
_STEM: Final = ("1a_3x3", "2a_3x3", "2b_3x3", "3b_1x1", "4a_3x3")
_CONVOLUTIONS: Final = (
    *(f"Conv2d_{layer}" for layer in _STEM),
    *(f"{block}.{branch}" for block, branches in _BLOCKS.items() for branch in branches),
)
_NORMALISED: Final = (
    "conv.weight",
    *(f"bn.{part}" for part in ("weight", "bias", "running_mean", "running_var")),
)
#: The tensors of the network; counters of batches, which nothing reads, aside.
INCEPTION_TENSORS: Final = frozenset(
    {f"{layer}.{part}" for layer in _CONVOLUTIONS for part in _NORMALISED}
    | {"fc.weight", "fc.bias"}
)


@dataclass(frozen=True)
class InceptionFiles:
    """Where the weights behind a scorer's name lie. digest: SHA-256 of the original file.

    original: the archive. converted: the safetensors copy; both are one file where the user names
    a converted one.
    """

    digest: str
    original: Path
    converted: Path


def inception_files(name: str = INCEPTION) -> InceptionFiles:
    """Return the files behind "inception-v3-compat" or "inception-v3-compat:FILE".

    FILE is an archive as torch-fidelity takes it (.pth), or one already converted (.safetensors).
    Without a FILE nothing is read: the published weights are meant.

    Raises:
        ModelFilesError: the named file is missing or cannot be read.
    """
    file = name.partition(":")[2]
    if not file:
        original = torch_hub_folder() / INCEPTION_FILE
        return InceptionFiles(INCEPTION_SHA256, original, _converted(INCEPTION_SHA256))
    path = Path(file).expanduser()
    if path.suffix == ".safetensors":
        return InceptionFiles(_source_of(path) or file_sha256(path), path, path)
    digest = file_sha256(path)
    return InceptionFiles(digest, path, _converted(digest))


def checked_inception(name: str = INCEPTION) -> InceptionFiles:
    """Return the files behind a name, after checking that there is one to load.

    Where the safetensors copy is there, nothing else is looked at.

    Raises:
        ModelFilesError: no file (says which, how large, where to put it), a damaged one, or not the
            published one.
    """
    files = inception_files(name)
    if files.converted.is_file():
        _source_of(files.converted)
    elif ":" in name:
        _check_archive(files.original)
    else:
        _check_published(files.original)
    return files


def inception_file(name: str = INCEPTION) -> Path:
    """Return the file that will be read for a name, after checking that it names every tensor.

    Raises:
        ModelFilesError: as of `checked_inception`; or it holds another network.
    """
    files = checked_inception(name)
    path = files.converted if files.converted.is_file() else files.original
    check_tensors([path], INCEPTION_TENSORS, INCEPTION)
    return path


def cache_folder() -> Path:
    """Return where converted weights are kept: XDG_CACHE_HOME or ~/.cache, dipgo-sweep."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dipgo-sweep"


def _check_published(path: Path) -> None:
    where = f"fetch {INCEPTION_URL} on a machine with network and put it there"
    if not path.is_file():
        raise ModelFilesError(
            f"no Inception weights at {path} ({INCEPTION_BYTES:,} bytes): {where}, or name a file "
            f"as '{INCEPTION}:FILE'"
        )
    size = path.stat().st_size
    if size != INCEPTION_BYTES:
        raise ModelFilesError(
            f"{path} has {size:,} bytes, the published file has {INCEPTION_BYTES:,}: it is "
            f"truncated or another file; {where} again"
        )
    found = file_sha256(path)
    if found != INCEPTION_SHA256:
        raise ModelFilesError(
            f"{path} is damaged or another file: its SHA-256 is {found}, that of the published "
            f"file {INCEPTION_SHA256}; {where} again"
        )


def _check_archive(path: Path) -> None:
    """Check an archive of PyTorch, a zip; those of before 2020 are only read when converted."""
    with path.open("rb") as stream:
        if stream.read(2) != b"PK":
            return
        try:
            with zipfile.ZipFile(stream) as archive:
                damaged = archive.testzip()
        except zipfile.BadZipFile as error:
            damaged = str(error)
    if damaged is not None:
        raise ModelFilesError(
            f"{path} cannot be read ({damaged}): it may be truncated, copy it again"
        )


def _converted(digest: str) -> Path:
    return cache_folder() / "inception" / f"{digest}.safetensors"


def _source_of(path: Path) -> str | None:
    """Return the digest of the archive that a converted file was made from, as it tells."""
    try:
        with safe_open(path, framework="numpy") as file:
            return (file.metadata() or {}).get(SOURCE_SHA256)
    except (OSError, SafetensorError) as error:
        raise ModelFilesError(
            f"Inception weights {path} cannot be read ({error}): copy the file again, or delete it "
            "where it is the copy in the cache, which is then made anew"
        ) from error
