"""Where a model's parts come from when its `id` is not a whole pipeline. No torch.

A single file holds weights without configs and tokenizers, and some repositories hold a denoiser
alone (LCM-SDXL). The rest is that of the model's base: another model, whole.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

from dipgo_core.config import ModelSettings
from dipgo_core.errors import ModelFilesError
from dipgo_core.families import KNOWN_MODELS, find_known
from dipgo_core.hub import is_hub_id, split_id
from dipgo_core.zoo import zoo_path

#: What comes from elsewhere than a base: all weights, or the denoiser whole.
Elsewhere = Literal["weights", "denoiser"]

_SINGLE: Final = ".safetensors"
_PICKLES: Final = (".ckpt", ".pt", ".pth", ".bin")


def is_file_name(model_id: str) -> bool:
    """Return whether an id names one file of weights."""
    return Path(model_id).suffix in (_SINGLE, *_PICKLES)


def is_partial(model_id: str) -> bool:
    """Return whether an id is known to hold less than a whole pipeline."""
    known = find_known(model_id)
    return is_file_name(model_id) or (known is not None and known.base != "")


def single_file(model_id: str) -> Path | None:
    """Return the file of a model that is one; None for folders, bundled names and hub ids.

    Raises:
        ModelFilesError: there is no such file, or it is a pickle.
    """
    if not is_file_name(model_id):
        return None
    path = Path(model_id).expanduser()
    if path.is_dir():
        return None
    if path.suffix != _SINGLE:
        raise ModelFilesError(
            f"{model_id} is a pickle, which may run code when it is read and never is: convert it, "
            "safetensors.torch.save_file(torch.load(path, weights_only=True)['state_dict'], "
            "'model.safetensors'), or take the model's safetensors"
        )
    if not path.is_file():
        raise ModelFilesError(f"there is no file {model_id}; give the path of a {_SINGLE} file")
    return path


def base_of(settings: ModelSettings) -> ModelSettings | None:
    """Return the model that the rest of the pipeline comes from; None where `id` is all of it.

    Raises:
        ModelFilesError: the id is a single file, and no base is named.
    """
    known = find_known(settings.id)
    base = settings.base or (known.base if known is not None else "")
    if base:
        if Path(base).expanduser().is_dir() or _is_bundled(base):
            return ModelSettings(id=base)
        hub_id, revision = split_id(base)
        return ModelSettings(id=hub_id, revision=revision)
    if is_file_name(settings.id) and single_file(settings.id) is not None:
        raise ModelFilesError(needs_base(settings.id))
    return None


def elsewhere(settings: ModelSettings) -> Elsewhere:
    """Return what a model with a base does not take from it."""
    return "denoiser" if single_file(settings.id) is None else "weights"


def needs_base(model_id: str) -> str:
    """Return what to do about a single file whose base is not named."""
    ids = ", ".join(known.id for known in KNOWN_MODELS if not known.bundled and not known.base)
    return (
        f"{model_id} is one file of weights, without configs and tokenizers: name with `base` the "
        f"model whose they are, a folder or a hub id (such as {ids})"
    )


def model_folder(model_id: str) -> Path | None:
    """Return the folder of a bundled name or local path, or None for a hub id.

    Raises:
        ModelFilesError: the id is none of these.
    """
    known = find_known(model_id)
    if known is not None and known.bundled:
        return zoo_path(known.id)
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        return folder
    if known is None and not is_hub_id(model_id):
        raise ModelFilesError(
            f"{model_id!r} is no bundled model, no folder or file here and no hub id (owner/name)"
        )
    return None


def _is_bundled(name: str) -> bool:
    known = find_known(name)
    return known is not None and known.bundled
