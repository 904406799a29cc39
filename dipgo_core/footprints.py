"""How many bytes a model's calls hold: traced on fake tensors, without weights and without a GPU.

Counted are tensors, each storage once, from its creation to its end, also those that autograd
saves. Attention counts as a fused kernel, as on a GPU. What a GPU's libraries take besides
(workspaces, the context, gaps between blocks) is not counted: ``dipgo_core.memory`` adds it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from dipgo_core.decoding import Decoding, pixels_per_latent, set_decoding
from dipgo_core.families import Config, Family
from dipgo_core.graph import BlockGraph
from dipgo_core.hooks import install
from dipgo_core.losses import ssim_loss
from dipgo_core.meta import meta_inputs
from dipgo_core.repeat import Repeat
from dipgo_core.supernet import SoftGates


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside its `with` block and still alive; `peak` is the most.

    Works on real and on fake tensors. Tensors from before the block are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, made=False)
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            self._note(tensor, made=True)
        return result

    def _note(self, tensor: Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            size = storage.nbytes() if made else 0
            self.live += size
            self.peak = max(self.peak, self.live)
            self._known[key] = weakref.finalize(storage, self._ended, key, size)

    def _ended(self, key: int, size: int) -> None:
        self.live -= size
        del self._known[key]


def _tensors(nested: Any) -> Iterator[Tensor]:
    return (leaf for leaf in pytree.tree_leaves(nested) if isinstance(leaf, Tensor))


@contextmanager
def fake_tensors(dtype: torch.dtype) -> Iterator[None]:
    """Make every tensor of the block a fake one: shapes and lifetimes without data.

    dtype: of the networks that are built inside.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.set_default_dtype(before)


def call_bytes(
    make: Callable[[], nn.Module],
    graph: BlockGraph,
    inputs: Callable[[], Mapping[str, Any]],
    dtype: torch.dtype,
) -> dict[str, int]:
    """Return what one denoiser call holds; both arguments are called among fake tensors.

    inputs: keyword arguments of the call, as many rows as wanted, the latents first. forward: at
    most without gradients, caches not counted. cache: kept for the next call under soft gates.
    saved: with gradients, until its backward pass; backward: at most during that, if the call is
    computed again in it.
    """
    kept, again = (SoftGates(graph, checkpointing=on) for on in (False, True))
    for policy in (kept, again):
        policy.start(torch.ones(2, graph.num_blocks, requires_grad=True), Repeat(None))
    with fake_tensors(dtype):
        denoiser, arguments = make().eval().requires_grad_(False), inputs()
        with torch.no_grad(), LiveBytes() as dense:
            denoiser(**arguments)
        next(iter(arguments.values())).requires_grad_(True)  # as what the call before has made
        saved, _ = _second_call(denoiser, graph, kept, arguments)
        _, backward = _second_call(denoiser, graph, again, arguments)
        cache = _size_of(kept.cache)
    return {"forward": dense.peak, "cache": cache, "saved": saved, "backward": backward}


def _second_call(
    denoiser: nn.Module, graph: BlockGraph, policy: SoftGates, arguments: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the bytes of a call that has a cache: after it, and at most up to its gradients."""
    handle = install(denoiser, graph, policy)
    try:
        denoiser(**arguments)
        with LiveBytes() as live:
            policy.start_call(1)
            output = denoiser(**arguments, return_dict=False)[0]
            saved = int(live.live)
            output.sum().backward()
    finally:
        handle.remove()
    return saved, int(live.peak)


def denoiser_rows(family: Family, config: Config, tokens: int, rows: int) -> dict[str, Any]:
    """Return the arguments of a call of so many rows; call it among fake tensors."""
    one = meta_inputs(family.inputs(config, family.latent_side(config), tokens))

    def several(tensor: Tensor) -> Tensor:
        shape = (rows, *tensor.shape[1:]) if tensor.shape[0] == 1 else tensor.shape
        return torch.zeros(shape, dtype=None if tensor.is_floating_point() else tensor.dtype)

    made: dict[str, Any] = pytree.tree_map_only(Tensor, several, one)
    return made


def decode_bytes(
    make: Callable[[], Any], latents: tuple[int, ...], dtype: torch.dtype
) -> dict[str, int]:
    """Return what decoding latents of this shape holds, images and their loss included.

    forward: at most without gradients. backward: at most with gradients, up to the latents;
    checkpointed: the same when the decoder's blocks are computed again in the backward pass.
    tiled, tiled_backward: forward and checkpointed, in tiles of half the side.
    """
    with fake_tensors(dtype):
        vae = make().eval().requires_grad_(False)
        side = latents[-1] * pixels_per_latent(vae.config)
        whole = {"forward": _decoded(vae, latents), "backward": _differentiated(vae, latents)}
        set_decoding(vae, Decoding(checkpointing=True))
        again = {"checkpointed": _differentiated(vae, latents)}
        set_decoding(vae, Decoding(checkpointing=True, tile=side // 2))
        tiled = {"tiled": _decoded(vae, latents), "tiled_backward": _differentiated(vae, latents)}
    return {**whole, **again, **tiled}


def _decoded(vae: Any, latents: tuple[int, ...]) -> int:
    with torch.no_grad(), LiveBytes() as live:
        vae.decode(torch.zeros(latents))
    return int(live.peak)


def _differentiated(vae: Any, latents: tuple[int, ...]) -> int:
    with LiveBytes() as live:
        images = vae.decode(torch.zeros(latents, requires_grad=True), return_dict=False)[0]
        ssim_loss(images, torch.zeros(images.shape)).backward()  # type: ignore[no-untyped-call]
    return int(live.peak)


def _size_of(nested: Any) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(nested)}
    return sum(storages.values())
