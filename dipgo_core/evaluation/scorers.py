"""Which network gives which score: ids, digests and files of the scorers. No torch.

A scorer's id and digest are part of the protocol: two networks are two scales. What is told here
needs no weights to be loaded, so that a sweep can be planned where no weights are.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dipgo_core.errors import ModelFilesError, UnknownModelError, nearest
from dipgo_core.evaluation.metrics import Role
from dipgo_core.hub import MAIN, is_hub_id, split_id
from dipgo_core.model_files import check_weights
from dipgo_core.zoo import ZOO_MODELS, zoo_path

TINY_FEATURES = "tiny-features"
INCEPTION = "inception-v3-compat"

#: The file torch-fidelity publishes; its name ends with the first digits of its SHA-256.
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SHA256 = "6726825d"
INCEPTION_URL = (
    f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
)


@dataclass(frozen=True)
class Scorer:
    """One scoring network: its id, what pins its weights, and how it sees images.

    digest: SHA-256 (or its published prefix) of the weights, or ``hub:<id>@<revision>``.
    resize: how an image of any size reaches the network.
    """

    id: str
    digest: str
    resize: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scorer:
        return cls(**data)


def scorer_of(role: Role, name: str) -> Scorer:
    """Return the scorer called `name` in a role, without loading weights.

    Raises:
        UnknownModelError: no scorer of this role has this name.
        ModelFilesError: the name is a path without the files it should hold.
    """
    return SCORERS[role](name)


def features_scorer(name: str) -> Scorer:
    """Return the feature scorer called `name`: "tiny-features", "inception-v3-compat", or
    "inception-v3-compat:FILE".

    Without a FILE torch-fidelity's published weights are meant, with one it is digested.

    Raises:
        UnknownModelError: no feature scorer has this name.
        ModelFilesError: the named file does not exist.
    """
    kind, _, file = name.partition(":")
    if name == TINY_FEATURES:
        weights = zoo_path(TINY_FEATURES) / "model.safetensors"
        return Scorer(TINY_FEATURES, file_sha256(weights), "antialiased bilinear to 32x32")
    if kind == INCEPTION:
        digest = file_sha256(inception_file(name)) if file else INCEPTION_SHA256
        return Scorer(INCEPTION, digest, "TensorFlow 1 bilinear to 299x299")
    valid = (TINY_FEATURES, INCEPTION, f"{INCEPTION}:FILE")
    raise UnknownModelError(
        f"no feature scorer is called {name!r}; known are {', '.join(valid)}.{nearest(name, valid)}"
    )


def inception_file(name: str = INCEPTION) -> Path:
    """Return the weights file behind "inception-v3-compat" or "inception-v3-compat:FILE".

    Raises:
        ModelFilesError: there is no such file; says where to get it and where to put it.
    """
    _, _, file = name.partition(":")
    path = Path(file).expanduser() if file else _torch_hub_folder() / INCEPTION_FILE
    if not path.is_file():
        raise ModelFilesError(
            f"no Inception weights at {path}: fetch {INCEPTION_URL} (91 MB) on a machine with "
            f"network and put it there, or name a file as '{INCEPTION}:FILE'"
        )
    return path


def clip_scorer(name: str) -> Scorer:
    """Return the CLIP scorer called `name`: "tiny-clip", a local folder, or ``owner/name`` on the
    hub, of which ``owner/name@revision`` names a commit.

    A folder is digested by its files; a hub id by its revision, so that no download is needed.

    Raises:
        ModelFilesError: the name is a path without a model in it, or its weights are damaged.
    """
    folder = network_folder(name)
    resize = "the model's own image processor"
    if folder is None:
        hub_id, revision = split_id(name)
        return Scorer(hub_id, f"hub:{hub_id}@{revision or MAIN}", resize)
    check_weights(sorted(folder.glob("*.safetensors")))
    bundled = name in ZOO_MODELS
    return Scorer(name if bundled else folder.name, folder_sha256(folder), resize)


def hub_scorer(name: str) -> bool:
    """Return whether a scorer's name means a repository on the hub."""
    return network_folder(name) is None and is_hub_id(split_id(name)[0])


def network_folder(name: str) -> Path | None:
    """Return the local folder of a network that transformers loads, or None where `name` is none.

    Raises:
        ModelFilesError: a folder was named, and it is missing or holds no config.json.
    """
    if name in ZOO_MODELS:
        folder = zoo_path(name)
    elif Path(name).expanduser().is_dir() or name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
    else:
        return None
    if not (folder / "config.json").is_file():
        raise ModelFilesError(
            f"no network in {folder}: config.json is missing; name a folder written by "
            "save_pretrained, a hub id, or a bundled name"
        )
    return folder


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        ModelFilesError: the file cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelFilesError(f"cannot read {path}: {error.strerror}") from error


def folder_sha256(folder: Path) -> str:
    """Return one SHA-256 over the names and bytes of all files of a folder, hidden ones aside."""
    digest = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    for path in sorted(files, key=lambda path: path.relative_to(folder).as_posix()):
        name = path.relative_to(folder).as_posix()
        if not name.startswith(".") and "/." not in name:
            digest.update(f"{name}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _torch_hub_folder() -> Path:
    """Return where torch.hub keeps weights, by its documented environment variables."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("TORCH_HOME") or str(Path(cache) / "torch")
    return Path(home).expanduser() / "hub" / "checkpoints"


#: How a role's scorer is looked up by its name.
SCORERS: Mapping[Role, Callable[[str], Scorer]] = {
    "features": features_scorer,
    "clip": clip_scorer,
}
