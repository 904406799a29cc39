"""A model's block graph from its configs: of known models, local folders and hub ids."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import diffusers
import torch

from dipgo_core import hub
from dipgo_core.blocks import trace_denoiser
from dipgo_core.config import ModelSettings
from dipgo_core.decoding import pixels_per_latent
from dipgo_core.errors import ConfigError, HubError, ModelFilesError, UnknownModelError
from dipgo_core.families import (
    FAMILIES,
    KNOWN_MODELS,
    Config,
    Family,
    KnownModel,
    find_known,
)
from dipgo_core.graph import BlockGraph
from dipgo_core.model_base import model_folder, single_file
from dipgo_core.model_files import model_index
from dipgo_core.pipelines import block_graph, family_in, load_model, tokens_of_call


@dataclass(frozen=True)
class Outline:
    """A model as its configs describe it. resolution: of the images, in pixels."""

    id: str
    family: Family
    resolution: int
    graph: BlockGraph


@dataclass(frozen=True)
class _Facts:
    """config: arguments of the denoiser's class. factor: pixels a latent, in one direction."""

    family: Family
    config: Mapping[str, Any]
    tokens: int
    factor: int


def outline_of(
    model_id: str, *, granularity: str = "block", resolution: int | None = None
) -> Outline:
    """Trace the denoiser of a known model, a local folder or a hub id, on the meta device.

    Of a folder whose pipeline is in no family the weights are loaded as well, for one call of it
    shows what its denoiser is given.

    resolution: side of the images in pixels; None: what the model is made for.

    Raises:
        UnknownModelError: there is no such model; names the nearest known one.
        ModelFilesError: configs are missing or cannot be read.
        ConfigError: a resolution that the model cannot have.
    """
    known = find_known(model_id)
    if known is None:
        folder = _folder(model_id)
        family = family_in(folder, model_id)
        if not family.blocks:
            return _outline_of_loaded(folder, granularity, resolution)
    facts = _facts_of_known(known) if known else _facts_of_folder(folder, family)
    with torch.device("meta"):
        denoiser = getattr(diffusers, facts.family.denoiser).from_config(dict(facts.config))
    side = facts.family.latent_side(denoiser.config)
    if resolution is not None:
        _check_resolution(resolution, side * facts.factor, facts.family, denoiser.config)
        side = resolution // facts.factor
    graph = trace_denoiser(
        denoiser, facts.family, tokens=facts.tokens, side=side, granularity=granularity
    )
    return Outline(model_id, facts.family, side * facts.factor, graph)


def _outline_of_loaded(folder: Path, granularity: str, resolution: int | None) -> Outline:
    model = load_model(ModelSettings(id=str(folder), resolution=resolution))
    return Outline(str(folder), model.family, model.resolution, block_graph(model, granularity))


def _facts_of_known(known: KnownModel) -> _Facts:
    family = FAMILIES[known.family]
    full = {**_defaults(getattr(diffusers, family.denoiser)), **known.config}
    return _Facts(family, known.config, known.tokens, known.resolution // family.latent_side(full))


def _defaults(denoiser: Any) -> dict[str, Any]:
    parameters = inspect.signature(denoiser.__init__).parameters.values()
    return {each.name: each.default for each in parameters}


def _check_resolution(resolution: int, own: int, family: Family, config: Config) -> None:
    multiple = family.size_multiple
    if multiple is None and resolution != own:
        raise ConfigError(f"{family.pipeline} makes images of {own} pixels alone, not {resolution}")
    if multiple is not None and resolution % multiple:
        raise ConfigError(
            f"resolution must be a multiple of {multiple} for {family.name}, got {resolution}"
        )
    most = family.largest(config)
    if most is not None and resolution > most:
        raise ConfigError(f"resolution must be at most {most} for this model, got {resolution}")


# configs in folders -------------------------------------------------------------------------------


def _folder(model_id: str) -> Path:
    """Return the folder that holds a model's configs; those of a hub id are fetched if need be."""
    if single_file(model_id) is not None:
        raise ModelFilesError(
            f"{model_id} is one file of weights: its graph is that of the model whose configs it "
            "takes (its `base`); name that one"
        )
    try:
        folder = model_folder(model_id)
        return _fetched(model_id) if folder is None else folder
    except HubError as error:
        raise HubError(f"{error}.{_nearest(model_id)}") from error
    except ModelFilesError as error:
        raise UnknownModelError(
            f"{error}; `dipgo-sweep models` lists the known ones.{_nearest(model_id)}"
        ) from error


def _nearest(model_id: str) -> str:
    """Name the known model that was meant, by its whole id or by the part after the owner."""
    names = {_short(known.id): known.id for known in KNOWN_MODELS}
    names |= {known.id.lower(): known.id for known in KNOWN_MODELS}
    for name in (model_id.lower(), _short(model_id)):
        if match := get_close_matches(name, names, n=1):
            return f" Did you mean {names[match[0]]!r}?"
    return ""


def _short(model_id: str) -> str:
    return model_id.rpartition("/")[2].lower()


def _fetched(model_id: str) -> Path:
    commit = hub.resolve_commit(model_id)
    there = hub.files_at(model_id, commit)
    family = family_in(hub.fetch(model_id, commit, ["model_index.json"]), model_id)
    if not family.blocks:
        raise ConfigError(
            f"{model_id} is of {family.pipeline}, which is in no family: only a call of it shows "
            "what its denoiser is given, and that takes its weights. Download the repository "
            f"(`hf download {model_id} --local-dir FOLDER`) and name the folder"
        )
    wanted = [
        f"{family.denoiser_attribute}/config.json",
        "vae/config.json",
        "tokenizer/tokenizer_config.json",
    ]
    return hub.fetch(model_id, commit, [name for name in wanted if name in there])


def _facts_of_folder(folder: Path, family: Family) -> _Facts:
    pipeline = getattr(diffusers, model_index(folder)["_class_name"])
    tokenizer = folder / "tokenizer" / "tokenizer_config.json"
    autoencoder = _json(folder / "vae" / "config.json")
    return _Facts(
        family,
        _json(folder / family.denoiser_attribute / "config.json"),
        tokens_of_call(
            pipeline, family, str(folder), lambda: int(_json(tokenizer)["model_max_length"])
        ),
        pixels_per_latent(autoencoder),
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read ({error}); copy the model again") from error
    return found
