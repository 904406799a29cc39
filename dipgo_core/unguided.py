"""Calls without guidance: the half of the batch that has the prompt runs, and stands for both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import SamplingError
from dipgo_core.families import calls_of
from dipgo_core.hooks import Forward, MethodHook
from dipgo_core.pipelines import LoadedModel
from dipgo_core.structures import flatten


@contextmanager
def guidance_followed(model: LoadedModel, sampler: SamplerSettings, images: int) -> Iterator[None]:
    """Leave guidance out after the sampler's `guidance_calls` calls while the block lasts.

    Guidance is the difference between the two halves of the batch that a stock pipeline hands to
    its denoiser; where both are the prediction for the prompt, the result is that prediction, bit
    for bit, and half of the work is not done. Every call of the pipeline in the block makes whole
    runs. images: of one call of the pipeline.

    Raises:
        SamplingError: this model's guidance is no doubled batch.
    """
    if sampler.guidance_calls is None:
        yield
        return
    if model.family.conditional is None:
        raise SamplingError(_why(model, "its pipeline doubles no batch for guidance"))
    hook = MethodHook(
        model.denoiser, "forward", _Halved(model, sampler, images, model.family.conditional)
    )
    try:
        yield
    finally:
        hook.remove()


class _Halved:
    """Counts the calls of a run, and halves those that have no guidance."""

    def __init__(
        self,
        model: LoadedModel,
        sampler: SamplerSettings,
        images: int,
        conditional: Literal["first", "last"],
    ) -> None:
        self._model = model
        self._guided, self._calls = sampler.guidance_calls or 0, calls_of(sampler)
        self._images = images
        self._half = slice(images) if conditional == "first" else slice(images, None)
        self._done = 0

    def __call__(self, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call, self._done = self._done % self._calls, self._done + 1
        if call < self._guided:
            return forward(*args, **kwargs)
        self._check(next(leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_batch(leaf)))
        args, kwargs = pytree.tree_map(self._halved, (args, kwargs))
        tensors, structure = flatten(forward(*args, **kwargs))
        return structure.rebuild(
            tuple(None if tensor is None else torch.cat([tensor, tensor]) for tensor in tensors)
        )

    def _halved(self, leaf: Any) -> Any:
        whole = _is_batch(leaf) and len(leaf) == 2 * self._images
        return leaf[self._half] if whole else leaf

    def _check(self, sample: Tensor) -> None:
        if len(sample) != 2 * self._images:
            what = f"it calls its denoiser with a batch of {len(sample)} for {self._images} images"
            raise SamplingError(_why(self._model, what))


def _is_batch(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0


def _why(model: LoadedModel, reason: str) -> str:
    return (
        f"guidance of {model.settings.id} cannot be left out at some calls: {reason}; leave the "
        "baseline guidance_off out"
    )
