"""Pipelines: the only from_pretrained; conditioning, noise, differentiable rollout, decoding."""

from __future__ import annotations

import copy
import inspect
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import diffusers
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn

from dipgo_core.blocks import trace_denoiser
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import ConfigError, ModelFilesError
from dipgo_core.families import (
    FAMILIES,
    Family,
    family_of_pipeline,
    find_known,
    find_noise_scheduler,
    num_calls,
)
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.hub import listed, resolve_commit
from dipgo_core.items import Item
from dipgo_core.model_files import hub_pipeline, model_folder, model_index, weights_digest
from dipgo_core.subnet import SubNet, config_sha256

logger = logging.getLogger(__name__)

NULL_CLASS = 1000  # DiTPipeline's label of the unconditional branch


class Predict(Protocol):
    """Evaluates the denoiser at one call and returns the guided prediction. # (B, C, h, w)"""

    def __call__(self, call: int, model_input: Tensor, timestep: Tensor) -> Tensor: ...


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

    @cached_property
    def decoder(self) -> Any:
        """The autoencoder in the precision of decoding: float32 where float16 would overflow."""
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            return copy.deepcopy(vae).to(torch.float32)
        return vae


@dataclass(frozen=True, eq=False)
class Conditioning:
    """What one batch is generated from, as keyword arguments of the denoiser.

    With guidance the arguments hold both halves, ordered as the stock pipeline orders them.
    """

    arguments: Mapping[str, Any]
    batch_size: int
    guidance_scale: float

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


# loading -----------------------------------------------------------------------------------------


def load_model(settings: ModelSettings, *, device: str = "cpu") -> LoadedModel:
    """Load a bundled model, a local folder or a hub id, from safetensors only.

    Of a hub model the commit that its revision is now is loaded, and told by the settings.

    Raises:
        ModelFilesError: files are missing or cannot be read.
        UnknownModelError: no family uses the pipeline's class.
    """
    folder = model_folder(settings.id)
    if folder is None:
        settings = replace(settings, revision=resolve_commit(settings.id, settings.revision))
        folder = hub_pipeline(settings)
    digest = weights_digest(settings)  # also finds missing files
    try:
        family = family_of_pipeline(_pipeline_class(settings.id, folder))
        pipe = getattr(diffusers, family.pipeline).from_pretrained(
            str(folder),
            use_safetensors=True,
            **_networks(folder, getattr(torch, settings.dtype)),
            **_NO_SAFETY_CHECKER.get(family.name, {}),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFilesError(
            f"{settings.id} cannot be loaded from {folder}: {error}\nCopy the model again."
        ) from error
    return loaded_model(pipe.to(device), settings, weights_sha256=digest)


_NO_SAFETY_CHECKER: dict[str, dict[str, Any]] = {
    "sd": {"safety_checker": None, "requires_safety_checker": False}
}


def _networks(folder: Path, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return a saved pipeline's networks, by component; the libraries would fill what a file lacks
    with random weights, or leave it without any.

    Raises:
        ModelFilesError: weights are missing; names component and tensors.
    """
    classes = {
        name: getattr(_LIBRARIES[origin[0]], origin[1], None)
        for name, origin in model_index(folder).items()
        if isinstance(origin, list) and origin[0] in _LIBRARIES
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


def _pipeline_class(model_id: str, folder: Path) -> str:
    known = find_known(model_id)
    if known is not None:
        return FAMILIES[known.family].pipeline
    return cast(str, diffusers.DiffusionPipeline.load_config(str(folder))["_class_name"])


def loaded_model(pipe: Any, settings: ModelSettings, *, weights_sha256: str) -> LoadedModel:
    """Prepare a pipeline that is in memory: freeze it, silence it, drop its safety checker.

    Raises:
        UnknownModelError: no family uses the pipeline's class.
    """
    family = family_of_pipeline(type(pipe).__name__)
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.eval().requires_grad_(False)
    return LoadedModel(pipe, family, settings, weights_sha256, dict(pipe.scheduler.config))


# sampling ----------------------------------------------------------------------------------------


def noise_scheduler(model: LoadedModel, sampler: SamplerSettings) -> Any:
    """Return a fresh diffusers scheduler with its timesteps set on the model's device.

    Raises:
        ConfigError: an unknown scheduler, or steps it cannot do.
    """
    known = find_noise_scheduler(sampler.scheduler)
    cls = getattr(diffusers, known.cls)
    spacing = {} if sampler.spacing is None else {"timestep_spacing": sampler.spacing}
    config = {k: v for k, v in model.scheduler_config.items() if k not in known.settings}
    scheduler = cls.from_config(config, **known.settings, **spacing)
    try:
        scheduler.set_timesteps(sampler.steps, device=model.device)
    except ValueError as error:
        raise ConfigError(
            f"sampler.steps {sampler.steps} is impossible with {sampler.scheduler}: {error}"
        ) from error
    if len(scheduler.timesteps) != num_calls(sampler.scheduler, sampler.steps):
        raise ConfigError(
            f"sampler.steps {sampler.steps} is impossible with {sampler.scheduler} and "
            f"{sampler.spacing or 'its own'} spacing: diffusers rounds them to "
            f"{len(scheduler.timesteps)} timesteps; take one step more or less"
        )
    return scheduler


def set_sampler(model: LoadedModel, sampler: SamplerSettings) -> list[float]:
    """Install the noise scheduler; return its timesteps, one a denoiser call (whole ones as int).

    Raises:
        ConfigError: an unknown scheduler, or steps it cannot do.
    """
    scheduler = noise_scheduler(model, sampler)
    model.pipe.scheduler = scheduler
    return timesteps_of(scheduler)


def timesteps_of(scheduler: Any) -> list[float]:
    """Return a scheduler's timesteps, one a denoiser call; whole numbers as int."""
    return [int(t) if t == int(t) else float(t) for t in scheduler.timesteps.tolist()]


def initial_latents(model: LoadedModel, seeds: Sequence[int]) -> Tensor:
    """Draw the noise the stock pipeline draws from one CPU generator an image.  # (B, C, h, w)"""
    config = cast(Any, model.denoiser).config
    shape = (1, config.in_channels, config.sample_size, config.sample_size)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=model.dtype)
        for seed in seeds
    ]
    return torch.cat(noise).to(model.device)


@torch.no_grad()
def encode(model: LoadedModel, items: Sequence[Item], guidance_scale: float) -> Conditioning:
    """Return the conditioning of a batch, as the stock pipeline makes it.

    Raises:
        ConfigError: a label-conditional model got an item without label.
    """
    guided = guidance_scale > 1
    arguments = _ENCODERS[model.family.name](model, items, guided)
    return Conditioning(arguments, len(items), guidance_scale)


def _encode_sd(model: LoadedModel, items: Sequence[Item], guided: bool) -> dict[str, Any]:
    prompts = [item.prompt for item in items]
    positive, negative = model.pipe.encode_prompt(prompts, model.device, 1, guided)
    return {"encoder_hidden_states": torch.cat([negative, positive]) if guided else positive}


def _encode_sdxl(model: LoadedModel, items: Sequence[Item], guided: bool) -> dict[str, Any]:
    prompts = [item.prompt for item in items]
    positive, negative, pooled, negative_pooled = model.pipe.encode_prompt(
        prompts, device=model.device, do_classifier_free_guidance=guided
    )
    side = model.pipe.default_sample_size * model.pipe.vae_scale_factor
    sizes = torch.tensor([[side, side, 0, 0, side, side]], dtype=positive.dtype)
    batch = len(items) * (2 if guided else 1)
    added = {
        "text_embeds": torch.cat([negative_pooled, pooled]) if guided else pooled,
        "time_ids": sizes.repeat(batch, 1).to(model.device),
    }
    states = torch.cat([negative, positive]) if guided else positive
    return {"encoder_hidden_states": states, "added_cond_kwargs": added}


def _encode_dit(model: LoadedModel, items: Sequence[Item], guided: bool) -> dict[str, Any]:
    unlabelled = [item.prompt for item in items if item.label is None]
    if unlabelled:
        raise ConfigError(
            f"{model.settings.id} is conditioned on class labels, but {unlabelled[0]!r} has none; "
            'give prompts as lines such as {"prompt": "...", "label": 7}'
        )
    labels = [cast(int, item.label) for item in items] + [NULL_CLASS] * len(items) * guided
    return {"class_labels": torch.tensor(labels, device=model.device)}


_ENCODERS: dict[str, Callable[[LoadedModel, Sequence[Item], bool], dict[str, Any]]] = {
    "sd": _encode_sd,
    "sdxl": _encode_sdxl,
    "dit": _encode_dit,
}


def predict(
    model: LoadedModel, conditioning: Conditioning, model_input: Tensor, timestep: Tensor
) -> Tensor:
    """Evaluate the denoiser once and apply guidance; differentiable.  # (B, C, h, w)

    model_input: latents after the scheduler's scaling, one a batch item (doubled here).
    """
    doubled = torch.cat([model_input] * 2) if conditioning.guided else model_input
    output = model.denoiser(
        doubled,
        timestep=timestep.expand(doubled.shape[0]),
        **conditioning.arguments,
        return_dict=False,
    )[0]
    output = output[:, : model_input.shape[1]]  # DiT: drops the learned sigma
    if not conditioning.guided:
        return cast(Tensor, output)
    first, second = output.chunk(2)
    conditional_first = model.family.conditioning == "label"  # DiTPipeline's order
    positive, negative = (first, second) if conditional_first else (second, first)
    return cast(Tensor, negative + conditioning.guidance_scale * (positive - negative))


def rollout(
    model: LoadedModel,
    conditioning: Conditioning,
    latents: Tensor,
    sampler: SamplerSettings,
    *,
    on_call: Callable[[int, Tensor], None] | None = None,
    predictor: Predict | None = None,
) -> Tensor:
    """Return the final latents of the stock pipeline call, differentiably.  # (B, C, h, w)

    on_call: gets the call's index and the latents before it. predictor: evaluates the denoiser
    instead of `predict` (for example under activation checkpointing).
    """
    scheduler = noise_scheduler(model, sampler)
    if model.family.conditioning == "prompt":  # DiTPipeline starts from unscaled noise
        latents = latents * scheduler.init_noise_sigma
    for call, timestep in enumerate(scheduler.timesteps):
        if on_call is not None:
            on_call(call, latents)
        model_input = scheduler.scale_model_input(latents, timestep)
        if predictor is None:
            prediction = predict(model, conditioning, model_input, timestep)
        else:
            prediction = predictor(call, model_input, timestep)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return latents


def decode(model: LoadedModel, latents: Tensor) -> Tensor:
    """Return the images of final latents, in [0, 1], differentiably.  # (B, 3, H, W)"""
    vae = model.decoder
    config = vae.config
    latents = latents.to(vae.dtype) / config.scaling_factor
    if getattr(config, "latents_mean", None) is not None:
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        latents = latents * std + mean
    images = vae.decode(latents, return_dict=False)[0]
    return cast(Tensor, (images / 2 + 0.5).clamp(0, 1))


# blocks and SubNets ------------------------------------------------------------------------------


def block_graph(model: LoadedModel, granularity: str = "block") -> BlockGraph:
    """Trace the denoiser into its block graph (on the meta device; the weights are not read)."""
    return trace_denoiser(
        model.denoiser, model.family, tokens=tokens_of(model.pipe), granularity=granularity
    )


def tokens_of(pipe: Any) -> int:
    """Return how many conditioning tokens a pipeline gives its denoiser (77 without tokenizer)."""
    tokenizer = getattr(pipe, "tokenizer", None)
    return 77 if tokenizer is None else int(tokenizer.model_max_length)


def deciding_config(configured: Any) -> dict[str, Any]:
    """Return the config fields that decide the output: arguments of the class, as JSON values."""
    accepted = inspect.signature(type(configured).__init__).parameters
    config = {k: v for k, v in configured.config.items() if k in accepted and k[0] != "_"}
    return cast(dict[str, Any], json.loads(json.dumps(config, sort_keys=True, default=list)))


def subnet_of(
    model: LoadedModel,
    graph: BlockGraph,
    sampler: SamplerSettings,
    gates: GateTable,
    **provenance: Any,
) -> SubNet:
    """Return the SubNet that runs `gates` (closed) on this model and sampler."""
    scheduler = noise_scheduler(model, sampler)
    closed = graph.close(gates)
    macs = {
        convention: {
            "dense": graph.call_macs(convention) * closed.num_calls,
            "kept": graph.macs(closed, convention),
            "pruned_ratio": graph.pruned_ratio(closed, convention),
        }
        for convention in ("all", "paper")
    }
    model_config, scheduler_config = deciding_config(model.denoiser), deciding_config(scheduler)
    return SubNet(
        gates=closed,
        block_names=graph.names,
        reuse=tuple(block.reuse for block in graph.blocks),
        granularity=graph.granularity,
        model={
            "family": model.family.name,
            "id": model.settings.id,
            "revision": model.settings.revision,
            "denoiser": type(model.denoiser).__name__,
            "config": model_config,
            "config_sha256": config_sha256(model_config),
        },
        sampler={
            "scheduler": type(scheduler).__name__,
            "config": scheduler_config,
            "config_sha256": config_sha256(scheduler_config),
            "steps": sampler.steps,
            "timesteps": timesteps_of(scheduler),
            "guidance_scale": sampler.guidance_scale,
        },
        macs={**macs["all"], "convention": "all", "paper": macs["paper"]},
        provenance=provenance,
    )
