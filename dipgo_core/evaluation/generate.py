"""Images from items and seeds, through the stock pipeline call, dense or under a SubNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import EvaluationError
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.hooks import MethodHook
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.subnet import SubNet
from dipgo_core.unguided import guidance_followed


@dataclass(frozen=True, eq=False)
class GeneratedBatch:
    """Images of consecutive items. images: (B, 3, H, W) uint8 on the model's device.

    latents: what the autoencoder was given, (B, C, h, w). forwards: denoiser forwards spent; a
    batch counts as one, a skipped call as none.
    """

    start: int
    images: Tensor
    latents: Tensor
    forwards: int


def generate(
    model: LoadedModel,
    items: Sequence[Item],
    seeds: Sequence[int],
    sampler: SamplerSettings,
    *,
    gates: GateTable | None = None,
    graph: BlockGraph | None = None,
    batch_size: int = 16,
) -> Iterator[GeneratedBatch]:
    """Yield the images of items[i] with noise seeds[i], in order, a batch at a time.

    Each image has its own CPU generator, so that its noise depends on no batch; images of other
    batch sizes agree within the model's numerical noise (latents within 1e-5 of the largest one in
    float32, a grey level in 8 bits). With `gates`
    the SubNet runs, and `graph` is needed. The model is left as it was between batches, with the
    sampler's noise scheduler installed.

    Raises:
        EvaluationError: an image is not finite or all black, or an item lacks its label.
    """
    if len(items) != len(seeds):
        raise EvaluationError(f"each item needs one seed, got {len(items)} and {len(seeds)}")
    subnet = _subnet(model, graph, sampler, gates)
    for start in range(0, len(items), batch_size):
        part = slice(start, start + batch_size)
        set_sampler(model, sampler)
        arguments = call_arguments(model, items[part], seeds[part], sampler)
        gated = apply_subnet(model.pipe, subnet) if subnet else nullcontext()
        with gated, guidance_followed(model, sampler, len(items[part])):
            pixels, latents, forwards = _watched_call(model, arguments)
        images = to_uint8(pixels, first_index=start)
        yield GeneratedBatch(start, images, latents, _computed(forwards, subnet))


def to_uint8(pixels: Tensor, *, first_index: int = 0) -> Tensor:
    """Return images in [0, 1] as uint8, rounded as the pipelines round.  # (B, 3, H, W)

    Raises:
        EvaluationError: an image is not finite or all black; names all of them.
    """
    broken = ~torch.isfinite(pixels).flatten(1).all(dim=1)
    _refuse(broken, first_index, "not finite", "try dtype float32 or bfloat16")
    images = (pixels * 255).round().clamp(0, 255).to(torch.uint8)
    black = images.flatten(1).amax(dim=1) == 0
    _refuse(black, first_index, "all black", "is a safety checker on, or the dtype too narrow?")
    return images


def _refuse(flagged: Tensor, first_index: int, fault: str, advice: str) -> None:
    if not bool(flagged.any()):
        return
    indices = (flagged.nonzero().flatten() + first_index).tolist()
    shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
    raise EvaluationError(
        f"{len(indices)} of {len(flagged)} images are {fault} (image {shown}): {advice}"
    )


def _subnet(
    model: LoadedModel,
    graph: BlockGraph | None,
    sampler: SamplerSettings,
    gates: GateTable | None,
) -> SubNet | None:
    if gates is None:
        return None
    if graph is None:
        raise EvaluationError("gates need the block graph they were made for")
    return subnet_of(model, graph, sampler, gates)


def _watched_call(model: LoadedModel, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, int]:
    """Call the pipeline; return its images, their final latents, and the forwards entered."""
    count = 0
    latents = torch.empty(0)

    def entered(*_: object) -> None:
        nonlocal count
        count += 1

    def decoded(decode: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal latents
        latents = args[0] if args else kwargs["z"]
        return decode(*args, **kwargs)

    forwards = model.denoiser.register_forward_pre_hook(entered)
    decoder = MethodHook(model.pipe.vae, "decode", decoded)
    try:
        images = model.pipe(**arguments).images
    finally:
        decoder.remove()
        forwards.remove()
    return images, latents, count


def _computed(forwards: int, subnet: SubNet | None) -> int:
    """Forwards that entered the denoiser; gate 0 of a call is the denoiser itself."""
    if subnet is None:
        return forwards
    keep = subnet.gates.keep
    return forwards * int(keep[:, 0].sum()) // len(keep)
