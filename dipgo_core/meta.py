"""Twins of a denoiser and of its inputs on the meta device: shapes without storage."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

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


#: What hooks (ours, accelerate's, diffusers') leave on modules; a copy would call the original.
_ATTACHED = ("forward", "_dipgo_hooks", "_hf_hook", "_old_forward", "_diffusers_hook")


def meta_copy(denoiser: nn.Module) -> nn.Module:
    """Return a frozen float32 copy without storage and without anything hooked onto modules."""
    storage = [*denoiser.parameters(), *denoiser.buffers()]
    memo = {id(tensor): _without_storage(tensor) for tensor in storage}
    attached = {
        module: {name: vars(module).pop(name) for name in _ATTACHED if name in vars(module)}
        for module in denoiser.modules()
    }
    try:
        twin = copy.deepcopy(denoiser, cast(dict[int, Any], memo))
    finally:
        for module, attributes in attached.items():
            vars(module).update(attributes)
    for module in twin.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return twin.eval()


def _without_storage(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
    return nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
