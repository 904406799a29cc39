"""How large a model is, from its facts or the headers of its weights. No torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Final

from safetensors import SafetensorError, safe_open

from dipgo_core import hub
from dipgo_core.errors import ModelFilesError
from dipgo_core.families import KNOWN_MODELS, Family
from dipgo_core.families.sizes import ModelSizes, known_sizes
from dipgo_core.model_base import single_file
from dipgo_core.model_files import model_index, network_files, pipeline_files
from dipgo_core.zoo import ZOO_MODELS, zoo_path

#: Parameters of published scorers, whose weights are float32 on the GPU; from their cards. Others
#: are counted in their files.
_SCORERS: Final = {
    "inception-v3-compat": 24_000_000,
    "lpips-alex": 2_500_000,
    "lpips-vgg": 14_700_000,
    "laion/CLIP-ViT-g-14-laion2B-s34B-b88K": 1_366_700_000,
    "timm/vit_large_patch14_clip_336.openai": 428_000_000,
    "facebook/dinov2-base": 86_600_000,
    "THUDM/ImageReward": 478_000_000,
}
_FLOAT32: Final = 4


def sizes_of(model_id: str, folder: Path | None, family: Family) -> ModelSizes | None:
    """Return what is known of a model's size; None for one that is neither known nor here.

    folder: where its files lie, unless the id is that of a single file. Of a model not known
    by name, what calls hold is that of a known model of the family whose networks have as many
    parameters, and so the same topology; without one, nobody knows it.
    """
    if model_id in known_sizes():
        return known_sizes()[model_id]
    try:
        if file := single_file(model_id):
            return _found(family.name, *_counted_in(file), upcast=True)
        return None if folder is None else _sizes_in(folder, family)
    except (OSError, ValueError, ModelFilesError, SafetensorError):
        return None


def _sizes_in(folder: Path, family: Family) -> ModelSizes:
    counted = component_parameters(folder)
    vae = json.loads((folder / "vae" / "config.json").read_text(encoding="utf-8"))
    text = sum(n for name, n in counted.items() if name.startswith("text_encoder"))
    networks = (counted[family.denoiser_attribute], text, counted["vae"])
    return _found(family.name, *networks, upcast=bool(vae.get("force_upcast", True)))


#: What tensors of single files begin with: denoiser, text encoders, autoencoder.
_PREFIXES: Final = (
    ("model.diffusion_model.",),
    ("cond_stage_model.", "conditioner.", "text_encoders."),
    ("first_stage_model.",),
)


def _counted_in(file: Path) -> tuple[int, ...]:
    """Return how many numbers a single file holds of denoiser, text encoders and autoencoder."""
    return tuple(parameters_in(file, prefixes) for prefixes in _PREFIXES)


def _found(family: str, denoiser: int, text: int, decoder: int, *, upcast: bool) -> ModelSizes:
    like = _like(family, denoiser, decoder)
    found = known_sizes()[like] if like else _UNTRACED
    return replace(found, denoiser=denoiser, text=text, decoder=decoder, upcast=upcast, like=like)


_UNTRACED: Final = ModelSizes(denoiser=0, text=0, decoder=0, side=1)


def _like(family: str, denoiser: int, decoder: int) -> str:
    """Return the known model with networks of these sizes, "" without one."""
    return next(
        (
            known.id
            for known in KNOWN_MODELS
            if known.family == family
            and (sizes := known_sizes().get(known.id)) is not None
            and (sizes.denoiser, sizes.decoder) == (denoiser, decoder)
        ),
        "",
    )


def component_parameters(folder: Path) -> Counter[str]:
    """Return how many numbers the weights of each component of a saved pipeline hold.

    Raises:
        ModelFilesError: the folder is no saved pipeline.
        SafetensorError: weights are damaged.
    """
    names = (path.relative_to(folder).as_posix() for path in folder.glob("*/*"))
    files = pipeline_files(model_index(folder), names)
    counted: Counter[str] = Counter()
    for name in files.deciding:
        if name.endswith(".safetensors"):
            counted[name.partition("/")[0]] += parameters_in(folder / name)
    return counted


def parameters_in(path: Path, prefixes: tuple[str, ...] = ("",)) -> int:
    """Return how many numbers a safetensors file holds, in tensors whose names begin like this."""
    with safe_open(path, framework="numpy") as weights:
        names = (name for name in weights.keys() if name.startswith(prefixes))  # noqa: SIM118
        return sum(math.prod(weights.get_slice(name).get_shape()) for name in names)


def scorer_bytes(name: str) -> int | None:
    """Return the bytes a scorer's weights take on a GPU; None where nobody knows.

    name: as a sweep file gives it: a bundled name, a hub id, a folder.
    """
    bare = name.partition("@")[0]
    known = _SCORERS.get(bare.partition(":")[0])
    if known is not None:
        return known * _FLOAT32
    folder = zoo_path(bare) if bare in ZOO_MODELS else _network_folder(bare)
    if folder is None or not folder.is_dir():
        return None
    found = network_files((path.name for path in folder.iterdir()), folder)
    weights = [folder / file for file in found.loaded if file.endswith(".safetensors")]
    try:
        return _FLOAT32 * sum(map(parameters_in, weights)) if weights else None
    except SafetensorError:
        return None  # told where it is loaded


def _network_folder(name: str) -> Path | None:
    if Path(name).is_dir():
        return Path(name)
    commit = hub.cached_commit(name) if hub.is_hub_id(name) else None
    return None if commit is None else hub.snapshot_folder(name, commit)
