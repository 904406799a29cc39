"""Tags: marks in the autograd graph that tell which block a tensor comes from.

A tag is an identity autograd function with a number. Walking back from a tensor ends at the nearest
tags.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from dipgo_core.graph import INPUT


class _Tag(torch.autograd.Function):
    """Identity that leaves its number in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, number: int) -> Tensor:
        ctx.number = number
        return tensor.clone()  # a view would refuse in-place additions by the next module

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("tags are read, never differentiated")


def tagged(value: Any, number: int) -> Any:
    def tag(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return _Tag.apply(leaf, number)
        return leaf

    return pytree.tree_map(tag, value)


def tagged_input(value: Any, *, real: bool) -> Any:
    """Return a differentiable, tagged copy of one argument of a forward.

    real: with its values, where it lies; else on the meta device.
    """

    def prepare(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point():
            return leaf if real else leaf.to("meta")
        twin = leaf.detach().clone() if real else torch.empty(leaf.shape, device="meta")
        return twin.requires_grad_()

    return tagged(pytree.tree_map(prepare, value), INPUT)


def nodes_of(value: Any) -> list[Node]:
    """Return where the autograd graph of every tensor in `value` ends."""
    leaves = pytree.tree_leaves(value)
    return [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn]


def producers_of(starts: Sequence[Node]) -> set[int]:
    """Walk back to the nearest tags; a leaf that is reached untagged counts as an input."""
    found: set[int] = set()
    seen: set[Node] = set()
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        number = getattr(node, "number", None)
        if number is not None:
            found.add(number)
        elif node.name().endswith("AccumulateGrad"):
            found.add(INPUT)
        else:
            stack.extend(following for following, _ in node.next_functions if following is not None)
    return found
