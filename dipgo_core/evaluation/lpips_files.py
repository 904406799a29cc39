"""The classifiers behind LPIPS: torchvision's files, where they lie, what they must be. No torch.

Nothing is fetched here: the files are put where torch.hub keeps them, or named.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

from dipgo_core.errors import EvaluationError, ModelFilesError, UnknownModelError, nearest
from dipgo_core.evaluation.tensor_names import check_tensors
from dipgo_core.model_files import file_sha256


@dataclass(frozen=True)
class Backbone:
    """One classifier. file: as published, the digits before its suffix begin its SHA-256.

    bytes: about how large it is. min_side: of the smallest images it can see, in pixels. layers:
    numbers of its convolutions.
    """

    net: Literal["alex", "vgg"]
    file: str
    bytes: int
    min_side: int
    layers: tuple[int, ...]

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that LPIPS reads of the file."""
        return tuple(f"features.{i}.{part}" for i in self.layers for part in ("weight", "bias"))

    @property
    def sha256_prefix(self) -> str:
        return Path(self.file).stem.rpartition("-")[2]

    @property
    def url(self) -> str:
        return f"https://download.pytorch.org/models/{self.file}"


_VGG: Final = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
BACKBONES: Final[Mapping[str, Backbone]] = {
    "lpips-alex": Backbone("alex", "alexnet-owt-7be5be79.pth", 244_400_000, 31, (0, 3, 6, 8, 10)),
    "lpips-vgg": Backbone("vgg", "vgg16-397923af.pth", 553_400_000, 16, _VGG),
}


def backbone_of(name: str) -> Backbone:
    """Return the classifier of "lpips-alex", "lpips-vgg", or one of them with ":FILE".

    Raises:
        UnknownModelError: no LPIPS has this name.
    """
    kind = name.partition(":")[0]
    if kind not in BACKBONES:
        valid = tuple(BACKBONES)
        raise UnknownModelError(
            f"no LPIPS is called {kind!r}; known are {', '.join(valid)}, each also as NAME:FILE."
            f"{nearest(kind, valid)}"
        )
    return BACKBONES[kind]


def backbone_file(name: str) -> Path:
    """Return the classifier's file behind "lpips-alex" or "lpips-alex:FILE".

    Raises:
        UnknownModelError: no LPIPS has this name.
        ModelFilesError: there is no such file; says where to get it and where to put it.
    """
    backbone = backbone_of(name)
    file = name.partition(":")[2]
    path = Path(file).expanduser() if file else torch_hub_folder() / backbone.file
    if not path.is_file():
        raise ModelFilesError(
            f"no classifier for LPIPS at {path}: fetch {backbone.url} "
            f"({backbone.bytes / 1e6:.0f} MB) on a machine with network and put it there, or name "
            f"a file as '{name.partition(':')[0]}:FILE'"
        )
    return path


def checked_backbone(name: str) -> Path:
    """Return the classifier's file, after checking that an unnamed one is the published one, and
    that a named one has its tensors.

    Raises:
        ModelFilesError: there is no such file, or it is another one.
    """
    path, backbone = backbone_file(name), backbone_of(name)
    if ":" in name:
        check_tensors([path], backbone.tensors, f"the classifier of {name} ({backbone.file})")
    else:
        found = file_sha256(path)
        if not found.startswith(backbone.sha256_prefix):
            raise ModelFilesError(
                f"{path} is not the published file: its SHA-256 begins with {found[:8]}, not "
                f"{backbone.sha256_prefix}. It may be truncated ({path.stat().st_size} of some "
                f"{backbone.bytes} bytes): fetch {backbone.url} again"
            )
    return path


def check_side(name: str, side: int) -> None:
    """Check that images are large enough for the classifier's layers. side: in pixels.

    Raises:
        EvaluationError: they are too small.
    """
    least = backbone_of(name).min_side
    if side < least:
        raise EvaluationError(
            f"{name.partition(':')[0]} needs images of {least} x {least} or more, got {side}: "
            "leave lpips out of the metrics, or use lpips-vgg, which sees images of 16 x 16"
        )


def heads_file(backbone: Backbone) -> Path:
    """Return the linear heads that torchmetrics ships; it is not imported for that."""
    spec = find_spec("torchmetrics")
    assert spec is not None and spec.origin is not None  # a dependency of ours
    return (
        Path(spec.origin).parent / "functional" / "image" / "lpips_models" / f"{backbone.net}.pth"
    )


def torch_hub_folder() -> Path:
    """Return where torch.hub keeps weights, by its documented environment variables."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or str(Path(cache) / "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"
