"""Pipelines: the only from_pretrained; a model loaded whole, or one error that says what lacks."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from dipgo_core.blocks import trace_denoiser
from dipgo_core.captured import captured_inputs, example_call
from dipgo_core.config import ModelSettings
from dipgo_core.decoding import pixels_per_latent
from dipgo_core.errors import ModelFilesError, UnknownModelError
from dipgo_core.families import (
    Family,
    call_options,
    family_of,
)
from dipgo_core.graph import BlockGraph
from dipgo_core.hub import listed, resolve_commit
from dipgo_core.model_base import Elsewhere, base_of, elsewhere, model_folder, single_file
from dipgo_core.model_files import DENOISERS, hub_network, hub_pipeline, model_index, weights_digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A pipeline ready for searching and evaluating: frozen weights, eval mode, no safety checker.

    scheduler_config: the noise scheduler's config as the model came; `set_sampler` starts from it.
    """

    pipe: Any
    family: Family
    settings: ModelSettings
    weights_sha256: str
    scheduler_config: Mapping[str, Any]

    @property
    def denoiser(self) -> nn.Module:
        return cast(nn.Module, getattr(self.pipe, self.family.denoiser_attribute))

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.denoiser.parameters()).dtype

    @property
    def resolution(self) -> int:
        """Side of the images in pixels: as the settings say, else the model's own."""
        if self.settings.resolution is not None:
            return self.settings.resolution
        return self.family.latent_side(cast(Any, self.denoiser).config) * scale_factor(self.pipe)

    @property
    def latent_side(self) -> int:
        """Side of the latents of one image."""
        return self.resolution // scale_factor(self.pipe)

    @property
    def size_arguments(self) -> dict[str, int]:
        """What a stock call must be told of the images' size; models of labels have one alone."""
        if self.family.conditioning == "label":
            return {}
        return {"height": self.resolution, "width": self.resolution}

    @cached_property
    def decoder(self) -> Any:
        """The autoencoder in the precision of decoding: float32 where float16 would overflow."""
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            return copy.deepcopy(vae).to(torch.float32)
        return vae


# loading -----------------------------------------------------------------------------------------


def load_model(settings: ModelSettings, *, device: str = "cpu") -> LoadedModel:
    """Load a bundled model, a local folder or a hub id, from safetensors only.

    Of a hub model the commit that its revision is now is loaded, and told by the settings.

    Raises:
        ModelFilesError: files are missing or cannot be read.
        UnknownModelError: no family uses the pipeline's class.
    """
    settings = _at_commits(settings)
    digest = weights_digest(settings)  # also finds missing files
    base = base_of(settings)
    part = None if base is None else elsewhere(settings)
    folder = pipeline_folder(base or settings, part)
    try:
        pipe = _built(settings, folder, part)
    except NotImplementedError as error:  # of a single file: weights that were never filled
        raise ModelFilesError(
            f"{settings.id} lacks weights of the pipeline that its base describes ({error}); is it "
            "whole, and `base` a model of its kind?"
        ) from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFilesError(
            f"{settings.id} cannot be loaded from {folder}: {error}\nCopy the model again."
        ) from error
    return loaded_model(pipe.to(device), settings, weights_sha256=digest)


def _at_commits(settings: ModelSettings) -> ModelSettings:
    """Return the settings with the commits that revisions on the hub are now."""
    base = base_of(settings)
    if base is not None and model_folder(base.id) is None:
        commit = resolve_commit(base.id, base.revision)
        settings = replace(settings, base=f"{base.id}@{commit}")
    if single_file(settings.id) is None and model_folder(settings.id) is None:
        settings = replace(settings, revision=resolve_commit(settings.id, settings.revision))
    return settings


def pipeline_folder(settings: ModelSettings, part: Elsewhere | None = None) -> Path:
    """Return the folder of a saved pipeline, fetched from the hub as far as it is needed.

    part: what of it comes from elsewhere.
    """
    return model_folder(settings.id) or hub_pipeline(settings, part)


def _built(settings: ModelSettings, folder: Path, part: Elsewhere | None) -> Any:
    """Build the pipeline from its folder, and from what replaces parts of that."""
    family = family_in(folder, settings.id)
    pipeline = getattr(diffusers, _pipeline_class(settings.id, folder))
    dtype = getattr(torch, settings.dtype)
    unchecked = _NO_SAFETY_CHECKER.get(family.name, {})
    file = single_file(settings.id)
    if file is not None:
        options = {"config": str(folder), "local_files_only": True, "torch_dtype": dtype}
        return _whole(pipeline.from_single_file(str(file), **options, **unchecked), settings.id)
    networks = _networks(folder, dtype, but=DENOISERS if part == "denoiser" else ())
    if part == "denoiser":
        own = model_folder(settings.id) or hub_network(settings.id, settings.revision)
        networks[family.denoiser_attribute] = _network(
            own, getattr(diffusers, family.denoiser), dtype
        )
    return pipeline.from_pretrained(str(folder), use_safetensors=True, **networks, **unchecked)


def _whole(pipe: Any, model_id: str) -> Any:
    """Return a pipeline read from a single file, if that had all its weights, with them in memory
    of their own: mapped ones lie as the file has them, and round otherwise than those of a folder.

    Raises:
        ModelFilesError: tensors are missing; names component and tensors.
    """
    for name, component in pipe.components.items():
        if not isinstance(component, nn.Module):
            continue
        if missing := sorted(n for n, tensor in component.state_dict().items() if tensor.is_meta):
            raise ModelFilesError(
                f"{model_id} lacks {len(missing)} tensors of {name}: {listed(missing)}. Is it "
                "whole, and `base` a model of its kind?"
            )
        for tensor in (*component.parameters(), *component.buffers()):
            tensor.data = tensor.data.clone()
    return pipe


_NO_SAFETY_CHECKER: dict[str, dict[str, Any]] = {
    "sd": {"safety_checker": None, "requires_safety_checker": False}
}


def _networks(
    folder: Path, dtype: torch.dtype, *, but: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Return a saved pipeline's networks, by component; the libraries would fill what a file lacks
    with random weights, or leave it without any.

    Raises:
        ModelFilesError: weights are missing; names component and tensors.
    """
    classes = {
        name: getattr(_LIBRARIES[origin[0]], origin[1], None)
        for name, origin in model_index(folder).items()
        if isinstance(origin, list) and origin[0] in _LIBRARIES and name not in but
    }
    return {
        name: _network(folder / name, found, dtype)
        for name, found in classes.items()
        if isinstance(found, type) and issubclass(found, nn.Module)
    }


_LIBRARIES: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}


def _network(folder: Path, network_class: Any, dtype: torch.dtype) -> nn.Module:
    network, info = network_class.from_pretrained(
        str(folder), dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    unfilled = (name for name, tensor in network.state_dict().items() if tensor.is_meta)
    if missing := sorted({*info["missing_keys"], *unfilled}):  # of shards diffusers tells none
        raise ModelFilesError(
            f"the weights in {folder} lack {len(missing)} tensors of {network_class.__name__}: "
            f"{listed(missing)}. Copy the model again."
        )
    return cast(nn.Module, network)


def family_in(folder: Path, model_id: str) -> Family:
    """Return the family of a saved pipeline, else one made for it.

    Raises:
        ModelFilesError: it names code of its own, which is never run.
        UnknownModelError: no family uses its class, and it has no denoiser to gate.
    """
    return family_of(_pipeline_class(model_id, folder), _component_classes(folder))


def _pipeline_class(model_id: str, folder: Path) -> str:
    """Return the class that a saved pipeline names.

    Raises:
        ModelFilesError: it names code of its own, which is never run.
    """
    name = model_index(folder).get("_class_name")
    if not isinstance(name, str):
        raise ModelFilesError(
            f"{model_id}: model_index.json names the pipeline {name!r}; only those of diffusers "
            "are loaded, and no code that comes with a model is ever run"
        )
    if not hasattr(diffusers, name):
        raise UnknownModelError(
            f"{model_id}: diffusers {diffusers.__version__} has no pipeline {name!r}; it may need "
            "another version"
        )
    return name


def _component_classes(folder: Path) -> dict[str, str]:
    """Return the classes that a saved pipeline names, by component.

    Raises:
        ModelFilesError: one is of another library than diffusers and transformers.
    """
    index = model_index(folder).items()
    origins = {name: origin for name, origin in index if isinstance(origin, list)}
    for name, (library, *_) in origins.items():
        own = library is None or library in _LIBRARIES or hasattr(diffusers.pipelines, library)
        if not own or (folder / name / f"{library}.py").exists():
            raise ModelFilesError(
                f"{folder}: model_index.json takes {name} from {library!r}; only diffusers and "
                "transformers are loaded, and no code that comes with a model is ever run"
            )
    return {name: origin[1] for name, origin in origins.items()}


def loaded_model(pipe: Any, settings: ModelSettings, *, weights_sha256: str) -> LoadedModel:
    """Prepare a pipeline that is in memory: freeze it, silence it, drop its safety checker.

    Raises:
        UnknownModelError: no family uses the pipeline's class.
    """
    classes = {name: type(component).__name__ for name, component in pipe.components.items()}
    family = family_of(type(pipe).__name__, classes)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return LoadedModel(pipe, family, settings, weights_sha256, dict(pipe.scheduler.config))


# blocks ------------------------------------------------------------------------------------------


def block_graph(model: LoadedModel, granularity: str = "block") -> BlockGraph:
    """Trace the denoiser into its block graph (on the meta device; the weights are not read)."""
    return graph_of(
        model.pipe,
        model.family,
        granularity,
        model_id=model.settings.id,
        resolution=model.settings.resolution,
    )


def graph_of(
    pipe: Any,
    family: Family,
    granularity: str,
    *,
    model_id: str = "",
    resolution: int | None = None,
) -> BlockGraph:
    """Trace a pipeline's denoiser; resolution: side of the images, None: the model's own."""
    size = {} if resolution is None else {"height": resolution, "width": resolution}
    return trace_denoiser(
        getattr(pipe, family.denoiser_attribute),
        family,
        tokens=tokens_of(pipe, family, model_id),
        side=None if resolution is None else resolution // scale_factor(pipe),
        granularity=granularity,
        captured=lambda: captured_inputs(
            pipe, family.denoiser_attribute, {**example_call(pipe), **size}
        ),
    )


def scale_factor(pipe: Any) -> int:
    """Return how many pixels of an image's side are one latent."""
    known = getattr(pipe, "vae_scale_factor", None)  # DiT's pipeline does not say
    return int(known or pixels_per_latent(pipe.vae.config))


def tokens_of(pipe: Any, family: Family, model_id: str = "") -> int:
    """Return how many conditioning tokens the stock call gives the denoiser.

    model_id: of a known model, whose call has options of its own.
    """
    return tokens_of_call(
        type(pipe),
        family,
        model_id,
        lambda: int(getattr(pipe.tokenizer, "model_max_length", 77)),  # may have no tokenizer
    )


def tokens_of_call(
    pipeline: type, family: Family, model_id: str, tokenizer_length: Callable[[], int]
) -> int:
    """Return `tokens_of` a pipeline of a class, by the length that its tokenizer pads texts to."""
    tokens = 0
    if family.tokens in ("tokenizer", "tokenizer+sequence"):
        tokens += tokenizer_length()
    if family.tokens in ("sequence", "tokenizer+sequence"):
        accepted = inspect.signature(cast(Any, pipeline).__call__).parameters
        default = accepted["max_sequence_length"].default
        tokens += int(call_options(family, model_id).get("max_sequence_length", default))
    return tokens
