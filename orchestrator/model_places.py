"""Where a model's files lie here, and what their configs say: image size, class names. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from dipgo_core import hub
from dipgo_core.config import ModelSettings
from dipgo_core.decoding import pixels_per_latent
from dipgo_core.errors import ModelFilesError
from dipgo_core.families import find_family, find_known
from dipgo_core.model_base import base_of, elsewhere, model_folder, single_file
from dipgo_core.model_files import model_index
from orchestrator.records import content_key
from orchestrator.sweep_settings import SweepModel

IMAGENET_CLASSES: Final = 1000

#: What only the hub could tell when the sweep ran: by `items_key` digest and number of items, by
#: `size_key` the side of the images.
KnownItems = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, kw_only=True)
class Configs:
    """Small files that facts of a model are read from, all of one folder or repository. field: of
    the sweep file, that names it."""

    settings: ModelSettings
    field: str
    files: tuple[str, ...]

    @property
    def on_hub(self) -> bool:
        return hub.is_hub_id(self.settings.id) and model_folder(self.settings.id) is None

    @property
    def folder(self) -> Path | None:
        """Where they lie here: in a folder, or in the hub's cache if it holds them all."""
        settings = self.settings
        folder = model_folder(settings.id)
        if folder is not None:
            return folder
        commit = hub.cached_commit(settings.id, settings.revision)
        cached = None if commit is None else hub.snapshot_folder(settings.id, commit)
        if cached is None or not all((cached / name).is_file() for name in self.files):
            return None
        return cached


@dataclass(frozen=True, kw_only=True)
class ConfigPlaces:
    """pipeline: of its index and autoencoder; denoiser: of the denoiser, whose config is the last
    of its files. Both are the same but for a denoiser that replaces that of a base."""

    pipeline: Configs
    denoiser: Configs

    @property
    def all(self) -> tuple[Configs, ...]:
        return tuple(dict.fromkeys((self.pipeline, self.denoiser)))


def config_places(model: SweepModel) -> ConfigPlaces:
    """Return where the configs of a model come from."""
    own, base = model.settings, base_of(model.settings)
    rest = ("model_index.json", "vae/config.json")
    if base is not None and elsewhere(own) == "denoiser":
        return ConfigPlaces(
            pipeline=Configs(settings=base, field="base", files=rest),
            denoiser=Configs(settings=own, field="id", files=("config.json",)),
        )
    files = (*rest, f"{find_family(model.family).denoiser_attribute}/config.json")
    field = "id" if base is None else "base"
    whole = Configs(settings=base or own, field=field, files=files)
    return ConfigPlaces(pipeline=whole, denoiser=whole)


def on_hub(model: SweepModel) -> bool:
    """Return whether configs of a model are on the hub."""
    return any(configs.on_hub for configs in config_places(model).all)


def size_key(model: SweepModel) -> str:
    """Return what the size of a model's images is kept under."""
    return content_key(["image_size", asdict(model.settings)])


def image_size(model: SweepModel, known: KnownItems | None = None) -> int:
    """Return the side of the images in pixels: as the sweep file says, else as the model's files do
    where they are here, else as it was when the sweep ran, or as models of its family have it.

    Raises:
        ModelFilesError: the model's configs cannot be read, or do not say it.
    """
    if model.settings.resolution is not None:
        return model.settings.resolution
    places = config_places(model)
    pipeline, denoiser = places.pipeline.folder, places.denoiser.folder
    family = find_family(model.family)
    if pipeline is None or denoiser is None:
        facts = find_known(model.settings.id)
        default = facts.resolution if facts else family.resolution
        return int((known or {}).get(size_key(model), [default])[0])
    autoencoder = pipeline / "vae" / "config.json"
    own = denoiser / places.denoiser.files[-1]
    try:
        side = family.latent_side(_config(own))
    except KeyError as error:
        raise _silent(own, str(error)) from error
    try:
        return side * pixels_per_latent(_config(autoencoder))
    except KeyError as error:
        raise _silent(autoencoder, str(error)) from error


def _silent(path: Path, field: str) -> ModelFilesError:
    return ModelFilesError(
        f"{path} has no {field}, so it does not say how large images are; give the model's "
        "`resolution`"
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read ({error}); copy the model again") from error
    return config


def local_folder(model: SweepModel) -> str | None:
    """Return a model that is a folder or file here, from the root; None for others."""
    if find_known(model.settings.id) is not None:
        return None
    place = single_file(model.settings.id) or model_folder(model.settings.id)
    return None if place is None else str(place.absolute())


def local_base(model: SweepModel) -> str | None:
    """Return a base that is a folder here, from the root."""
    base = base_of(model.settings)
    if base is None or find_known(base.id) is not None:
        return None
    folder = model_folder(base.id)
    return None if folder is None else str(folder.absolute())


def sized_folder(model: SweepModel) -> Path | None:
    """Return the folder whose weights are the model's; those of a base are not."""
    return None if base_of(model.settings) is not None else config_places(model).pipeline.folder


def class_names(model: SweepModel) -> dict[int, tuple[str, ...]]:
    """Return what a label-conditioned model calls its classes; numbers without its files."""
    folder = config_places(model).pipeline.folder
    index = model_index(folder) if folder is not None else {}
    named = index.get("id2label") or {str(i): f"class {i}" for i in range(IMAGENET_CLASSES)}
    return {
        int(label): tuple(text.strip() for text in texts.split(","))
        for label, texts in named.items()
    }
