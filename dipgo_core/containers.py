"""Containers of gated layers (a U-Net's stages): not entered in calls that need none of them.

Where gates lie on layers, a stage all of whose layers are dead would still join and hand on tensors
that nobody looks at. That its outputs are those of its layers is seen when it is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dipgo_core.gated import GatedCalls
from dipgo_core.graph import BlockGraph
from dipgo_core.hooks import Forward, MethodHook, named_module
from dipgo_core.structures import flatten


def container_hooks(
    denoiser: nn.Module, graph: BlockGraph, current: Callable[[], GatedCalls | None]
) -> Iterator[MethodHook]:
    """Hook the outermost modules that hold several layers of a graph."""
    members: dict[str, list[int]] = {}
    for index, block in enumerate(graph.blocks):
        if (name := _outermost(denoiser, block.name)) is not None:
            members.setdefault(name, []).append(index)
    for name, indices in members.items():
        intercept = _Container(name, tuple(indices), current)
        yield MethodHook(named_module(denoiser, name), "forward", intercept)


def _outermost(denoiser: nn.Module, name: str) -> str | None:
    """Return the outermost module around a layer that is no list of modules."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        around = ".".join(parts[:end])
        if not isinstance(named_module(denoiser, around), nn.ModuleList):
            return around
    return None


class _Container:
    """Interceptor of one container."""

    def __init__(
        self, name: str, members: tuple[int, ...], current: Callable[[], GatedCalls | None]
    ) -> None:
        self._name = name
        self._members = members
        self._current = current

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gates = self._current()
        if gates is None:
            return original(*args, **kwargs)
        known = gates.dead_container(self._name, self._members)
        if known is not None:
            tensors, structure = known
            return structure.rebuild(tensors)
        output = original(*args, **kwargs)
        if gates.learns_dead:
            gates.learn_container(self._name, self._members, *flatten(output))
        return output
