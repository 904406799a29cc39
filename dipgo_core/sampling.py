"""Sampling: the stock pipeline call as the one denoising loop, differentiable up to its decoder.

There is no second loop: what a search differentiates is what the pipeline does, with the guidance,
scaling and conditioning of its family. The loop ends where the autoencoder would decode.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import diffusers
import torch
from torch import Tensor

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import ConfigError, SamplingError
from dipgo_core.families import call_options, calls_of, find_noise_scheduler
from dipgo_core.hooks import Forward, MethodHook
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel
from dipgo_core.unguided import guidance_followed


@dataclass(frozen=True, eq=False)
class Batch:
    """What a batch of images is generated from: one item and one noise seed an image.

    Texts are encoded once for each guidance, whatever number of rollouts a batch is used for: some
    pipelines encode the empty prompt only where guidance asks for it.
    """

    items: tuple[Item, ...]
    seeds: tuple[int, ...]
    _encoded: dict[float, list[Any]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if len(self.items) != len(self.seeds):
            raise SamplingError(
                f"each item needs one seed, got {len(self.items)} and {len(self.seeds)}"
            )

    def __len__(self) -> int:
        return len(self.items)


# noise schedulers ---------------------------------------------------------------------------------


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
    arguments = model.family.schedule(scheduler.config, model.latent_side, sampler)
    named = next(iter(arguments))
    try:
        scheduler.set_timesteps(**arguments, device=model.device)
    except (ValueError, TypeError) as error:
        what = "steps" if named == "num_inference_steps" else named
        raise ConfigError(
            f"sampler.{what} {getattr(sampler, what)} is impossible with {sampler.scheduler}: "
            f"{error}"
        ) from error
    if len(scheduler.timesteps) != calls_of(sampler):
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


# the stock call -----------------------------------------------------------------------------------


def call_arguments(
    model: LoadedModel, items: Sequence[Item], seeds: Sequence[int], sampler: SamplerSettings
) -> dict[str, Any]:
    """Return the arguments of the stock pipeline call that makes a batch of images.

    Each image has its own CPU generator, so that its noise depends on no batch.

    Raises:
        SamplingError: a label-conditioned model got an item without label.
    """
    arguments: dict[str, Any] = {
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        **sampler_arguments(sampler),
        **model.size_arguments,
        **call_options(model.family, model.settings.id),
        "output_type": "pt",
    }
    if model.family.conditioning == "prompt":
        return {"prompt": [item.prompt for item in items], **arguments}
    for item in items:
        if item.label is None:
            raise SamplingError(
                f"{model.settings.id} is conditioned on class labels, but {item.prompt!r} has "
                "none: give texts that are labels of the model, or rows such as "
                '{"prompt": "...", "label": 7}'
            )
    return {"class_labels": [item.label for item in items], **arguments}


def sampler_arguments(sampler: SamplerSettings) -> dict[str, Any]:
    """Return what a stock call must be told of a sampler: steps, or their list, and guidance."""
    listed = {
        name: list(values)
        for name, values in (("timesteps", sampler.timesteps), ("sigmas", sampler.sigmas))
        if values is not None
    }
    return {
        "num_inference_steps": sampler.steps,
        **listed,
        "guidance_scale": sampler.guidance_scale,
    }


def rollout(
    model: LoadedModel,
    batch: Batch,
    sampler: SamplerSettings,
    *,
    on_call: Callable[[int], object] = lambda call: None,
) -> Tensor:
    """Return what the stock pipeline call would decode, differentiably.  # (B, C, h, w)

    on_call: told the number of each denoiser call of the run before it is made, from 0 on.

    Raises:
        SamplingError: the pipeline never reached its autoencoder; an item lacks its label.
    """
    num_calls = len(set_sampler(model, sampler))
    arguments = call_arguments(model, batch.items, batch.seeds, sampler)
    done = 0

    def stepped(step: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal done
        result = step(*args, **kwargs)
        done += 1
        if done < num_calls:
            on_call(done)
        return result

    on_call(0)
    encoded = batch._encoded.setdefault(sampler.guidance_scale, [])
    with (
        _hooked(model.pipe.scheduler, "step", stepped),
        _encoded_once(model.pipe, encoded),
        guidance_followed(model, sampler, len(batch)),
    ):
        return _undecoded(model.pipe, arguments)


def _undecoded(pipe: Any, arguments: Mapping[str, Any]) -> Tensor:
    """Run the pipeline's call, with gradients where they are enabled, up to its decoder."""

    def intercept(decode: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        raise _Reached(args[0] if args else kwargs["z"])

    call = inspect.unwrap(cast(Any, type(pipe).__call__))  # without the `no_grad` around it
    with _hooked(pipe.vae, "decode", intercept), _not_upcast(pipe):
        try:
            call(pipe, **arguments)
        except _Reached as reached:
            return cast(Tensor, reached.value)
    raise SamplingError(
        f"{type(pipe).__name__} ended without decoding its latents, so there is nothing to compare"
    )


class _Reached(Exception):
    """Leaves a pipeline call where it has told what was asked."""

    def __init__(self, value: Any) -> None:
        super().__init__("left on purpose")
        self.value = value


@contextmanager
def _hooked(owner: Any, name: str, intercept: Callable[..., Any]) -> Iterator[None]:
    hook = MethodHook(owner, name, intercept)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _not_upcast(pipe: Any) -> Iterator[None]:
    """Leave the autoencoder's precision alone while nothing is decoded (SDXL)."""
    if not hasattr(pipe, "upcast_vae"):
        yield
        return
    with _hooked(pipe, "upcast_vae", lambda upcast, args, kwargs: None):
        yield


@contextmanager
def _encoded_once(pipe: Any, encoded: list[Any]) -> Iterator[None]:
    """Give back what `encode_prompt` returned at first, call by call; kept in `encoded`."""
    if not hasattr(pipe, "encode_prompt"):
        yield
        return
    calls = count()

    def intercept(encode: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        number = next(calls)
        if number == len(encoded):
            with torch.no_grad():
                encoded.append(encode(*args, **kwargs))
        return encoded[number]

    with _hooked(pipe, "encode_prompt", intercept):
        yield


def decode(model: LoadedModel, latents: Tensor) -> Tensor:
    """Return the images of what `rollout` returned, in [0, 1], differentiably.  # (B, 3, H, W)"""
    decoder = model.decoder
    images = decoder.decode(latents.to(decoder.dtype), return_dict=False)[0]
    return cast(Tensor, (images / 2 + 0.5).clamp(0, 1))
