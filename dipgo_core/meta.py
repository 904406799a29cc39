"""Twins of a denoiser and of its inputs on the meta device: shapes without storage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dipgo_core.families import Meta


def meta_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return a family's arguments of a forward with tensors on the meta device."""
    return {
        name: meta_inputs(value) if isinstance(value, Mapping) else _meta(value)
        for name, value in inputs.items()
    }


def _meta(value: Any) -> Any:
    if not isinstance(value, Meta):
        return value
    return torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta")


#: What hooks (ours, accelerate's, diffusers') leave on modules; it would call the original.
_ATTACHED = ("forward", "_dipgo_hooks", "_hf_hook", "_old_forward", "_diffusers_hook")


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """Return a frozen float32 copy without storage and without anything hooked onto modules.

    The original is left as it is throughout: it may be running in another thread.
    """
    storage = [*denoiser.parameters(), *denoiser.buffers()]
    memo: dict[int, Any] = {id(tensor): _without_storage(tensor) for tensor in storage}
    for module in denoiser.modules():
        attached = [vars(module)[name] for name in _ATTACHED if name in vars(module)]
        memo |= {id(value): value for value in attached}  # not copied
    twin = copy.deepcopy(denoiser, memo)
    for module in twin.modules():
        for name in _ATTACHED:
            vars(module).pop(name, None)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin.eval()


def _without_storage(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
