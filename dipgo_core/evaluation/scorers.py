"""Which network gives which score: ids, digests and files of the scorers. No torch.

A scorer's id and digest are part of the protocol: two networks are two scales. What is told here
needs no weights to be loaded, so that a sweep can be planned where no weights are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dipgo_core.errors import ModelFilesError, UnknownModelError, nearest
from dipgo_core.evaluation.clip_files import clip_tensors, lacking_files
from dipgo_core.evaluation.image_reward_files import (
    VOCABULARY,
    WEIGHTS,
    check_reward,
    hub_files,
    reward_folder,
    words_of,
)
from dipgo_core.evaluation.inception_files import INCEPTION, inception_files
from dipgo_core.evaluation.lpips_files import (
    backbone_file,
    backbone_of,
    heads_file,
)
from dipgo_core.evaluation.metrics import Role
from dipgo_core.evaluation.open_clip_config import read_open_clip
from dipgo_core.evaluation.tensor_names import check_tensors
from dipgo_core.hub import MAIN, is_hub_id, split_id
from dipgo_core.model_files import (
    NETWORK_CONFIGS,
    OPEN_CLIP_CONFIG,
    check_weights,
    file_sha256,
    is_open_clip,
    lacking_message,
    network_files,
)
from dipgo_core.zoo import ZOO_MODELS, zoo_path

TINY_FEATURES = "tiny-features"
#: How many features each extractor has.
FEATURE_DIMS: Mapping[str, int] = {TINY_FEATURES: 64, INCEPTION: 2048}


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

    Without a FILE torch-fidelity's published weights are meant, with one it is digested; a
    converted FILE tells the digest of its original.

    Raises:
        UnknownModelError: no feature scorer has this name.
        ModelFilesError: the named file does not exist.
    """
    kind = name.partition(":")[0]
    if name == TINY_FEATURES:
        weights = zoo_path(TINY_FEATURES) / "model.safetensors"
        return Scorer(TINY_FEATURES, file_sha256(weights), "antialiased bilinear to 32x32")
    if kind == INCEPTION:
        return Scorer(INCEPTION, inception_files(name).digest, "TensorFlow 1 bilinear to 299x299")
    valid = (TINY_FEATURES, INCEPTION, f"{INCEPTION}:FILE")
    raise UnknownModelError(
        f"no feature scorer is called {name!r}; known are {', '.join(valid)}.{nearest(name, valid)}"
    )


def clip_scorer(name: str) -> Scorer:
    """Return the CLIP scorer called `name`: "tiny-clip", a local folder, or ``owner/name`` on the
    hub, of which ``owner/name@revision`` names a commit.

    A folder is digested by its files; a hub id by its revision, so that no download is needed: the
    commit decides how images are resized, too.

    Raises:
        ModelFilesError: the name is a path without a model in it, or its weights are damaged.
    """
    resize = "the model's own image processor"
    folder = network_folder(name)
    if folder is not None and model_type_of("clip", folder) == OPEN_CLIP:
        resize = read_open_clip(folder).resize
    return _network_scorer("clip", name, resize)


def cmmd_scorer(name: str) -> Scorer:
    """Return the CLIP image tower called `name`, as of `clip_scorer`, that CMMD embeds with.

    Raises:
        ModelFilesError: the name is a path without a CLIP in it, or its weights are damaged.
    """
    return _network_scorer("cmmd", name, "antialiased bicubic to the model's square")


def dino_scorer(name: str) -> Scorer:
    """Return the DINOv2 called `name`: a folder, or ``owner/name[@revision]`` on the hub.

    Raises:
        ModelFilesError: the name is a path without a DINOv2 in it, or its weights are damaged.
    """
    return _network_scorer("dino", name, "the model's own image processor")


def lpips_scorer(name: str) -> Scorer:
    """Return the LPIPS called `name`: "lpips-alex", "lpips-vgg", or "lpips-alex:FILE".

    Its digest is that of the classifier and that of the linear heads. Without a FILE torchvision's
    published classifier is meant; a FILE is digested, and the same scorer if it is that one.

    Raises:
        UnknownModelError: no LPIPS has this name.
        ModelFilesError: the named file does not exist.
    """
    kind, _, file = name.partition(":")
    backbone = backbone_of(name)
    classifier = file_sha256(backbone_file(name)) if file else backbone.sha256_prefix
    if classifier.startswith(backbone.sha256_prefix):
        classifier = backbone.sha256_prefix
    return Scorer(kind, f"{classifier}+{file_sha256(heads_file(backbone))}", "none")


def image_reward_scorer(name: str) -> Scorer:
    """Return the ImageReward called `name`: a folder, or ``owner/name[@revision[+commit]]`` on the
    hub, where the commit is that of the vocabulary.

    Raises:
        ModelFilesError: a folder was named that lacks files, or holds others.
    """
    resize = "antialiased bicubic to 224 on the shorter side, then the middle square"
    folder = reward_folder(name)
    if folder is None:
        sources = (f"{hub_id}@{revision or MAIN}" for hub_id, revision, _ in hub_files(name))
        return Scorer(split_id(name)[0], f"hub:{'+'.join(sources)}", resize)
    check_reward(folder / WEIGHTS)
    words_of(folder / VOCABULARY)
    parts = (file_sha256(folder / file) for file in (WEIGHTS, VOCABULARY))
    return Scorer(folder.name, "+".join(parts), resize)


def _network_scorer(role: Role, name: str, resize: str) -> Scorer:
    folder = network_folder(name)
    if folder is None:
        hub_id, revision = split_id(name)
        return Scorer(hub_id, f"hub:{hub_id}@{revision or MAIN}", resize)
    kind = model_type_of(role, folder)
    files = network_files(_names(folder), folder)
    if files.missing:
        raise ModelFilesError(f"{folder} {lacking_message(files)}")
    check_weights(folder / file for file in files.loaded)
    check_inputs(role, kind, files.loaded, str(folder))
    if kind == "clip":
        wanted = clip_tensors(folder, reads_prompts=role == "clip")
        weights = [folder / name for name in files.loaded if name.endswith(".safetensors")]
        check_tensors(weights, wanted, "a CLIP as its config.json describes it")
    bundled = name in ZOO_MODELS
    return Scorer(name if bundled else folder.name, files_sha256(folder, files.loaded), resize)


def check_inputs(role: Role, kind: str, names: Collection[str], place: str) -> None:
    """Check that a network's files tell how it sees images, and reads prompts where it does.

    kind: as of `model_type_of`. place: where the files are, as a message names it.

    Raises:
        ModelFilesError: files are missing; names them.
    """
    if kind == OPEN_CLIP:  # its tokenizer is among what `network_files` misses
        return
    if lacking := lacking_files(names, reads_prompts=role == "clip"):
        raise ModelFilesError(
            f"{place} lacks {' and '.join(lacking)}, which the {role} scorer prepares its input "
            "with: copy there what `save_pretrained` of its processor writes"
        )


#: What `model_type_of` calls a CLIP that open_clip saved.
OPEN_CLIP = "open_clip"
#: What a network of transformers calls itself in its config.json, by role.
MODEL_TYPES: Mapping[Role, tuple[str, ...]] = {
    "clip": ("clip", OPEN_CLIP),
    "cmmd": ("clip", "clip_vision_model", OPEN_CLIP),
    "dino": ("dinov2", "dinov2_with_registers"),
}


def model_type_of(role: Role, folder: Path) -> str:
    """Return what the network in a folder is, of the kinds that a role can use.

    Raises:
        ModelFilesError: its config cannot be read, or it is another kind of network.
    """
    found = _model_type(folder)
    if found not in MODEL_TYPES[role]:
        raise ModelFilesError(
            f"the {role} scorer must be a {' or '.join(MODEL_TYPES[role])}, {folder} holds a "
            f"{found}: name another folder or hub id"
        )
    return str(found)


def _model_type(folder: Path) -> Any:
    if is_open_clip(_names(folder), folder):
        read_open_clip(folder)  # refuses what is read by open_clip alone
        return OPEN_CLIP
    path = folder / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelFilesError(f"{path} cannot be read ({error}): copy it again") from error


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.is_file()]


def hub_scorer(name: str) -> bool:
    """Return whether a scorer's name means a repository on the hub."""
    return is_hub_id(split_id(name)[0]) and not Path(name).is_dir()


def hub_revisions(role: Role, name: str) -> tuple[tuple[str, str | None], ...]:
    """Return id and revision of each repository that a scorer on the hub is read from, its own
    first."""
    if role == "image_reward":
        return tuple((hub_id, revision) for hub_id, revision, _ in hub_files(name))
    return (split_id(name),)


def network_folder(name: str) -> Path | None:
    """Return the local folder of a network that transformers or open_clip saved, or None where
    `name` is none.

    Raises:
        ModelFilesError: a folder was named, and it is missing or holds no config.
    """
    if name in ZOO_MODELS:
        folder = zoo_path(name)
    elif Path(name).expanduser().is_dir() or name.startswith((".", "/", "~")):
        folder = Path(name).expanduser()
    else:
        return None
    if not any((folder / config).is_file() for config in NETWORK_CONFIGS):
        raise ModelFilesError(
            f"no network in {folder}: config.json is missing, and {OPEN_CLIP_CONFIG} too; name a "
            "folder written by save_pretrained or open_clip, a hub id, or a bundled name"
        )
    return folder


def files_sha256(folder: Path, names: Iterable[str]) -> str:
    """Return one SHA-256 over names and bytes of files in a folder.

    Raises:
        ModelFilesError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name}\0{file_sha256(folder / name)}\n".encode())
    return digest.hexdigest()


#: How a role's scorer is looked up by its name.
SCORERS: Mapping[Role, Callable[[str], Scorer]] = {
    "features": features_scorer,
    "clip": clip_scorer,
    "cmmd": cmmd_scorer,
    "lpips": lpips_scorer,
    "dino": dino_scorer,
    "image_reward": image_reward_scorer,
}
