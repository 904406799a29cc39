"""Structures: what a module returns, taken apart into its tensors and put together again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor
from torch.utils import _pytree as pytree

from dipgo_core.errors import TraceError

Tensors = tuple[Tensor | None, ...]


class Structure(Protocol):
    """How an output is built around its tensors."""

    def rebuild(self, tensors: Tensors) -> Any:
        """Return an output of this structure.

        Raises:
            TraceError: another number of tensors.
        """


@dataclass(frozen=True)
class PlainStructure:
    """A tensor, or a tuple of tensors (None among them) or of such tuples: no pytree is walked.

    widths: how many tensors each entry has, None where it is one itself; None for a lone tensor.
    """

    widths: tuple[int | None, ...] | None

    def rebuild(self, tensors: Tensors) -> Any:
        if self.widths is None:
            _check_count(tensors, 1)
            return tensors[0]
        _check_count(tensors, sum(1 if width is None else width for width in self.widths))
        output, start = list[Any](), 0
        for width in self.widths:
            end = start + (1 if width is None else width)
            output.append(tensors[start] if width is None else tensors[start:end])
            start = end
        return tuple(output)


@dataclass(frozen=True)
class TreeStructure:
    """Any other output: dicts, lists, model outputs."""

    spec: pytree.TreeSpec
    constants: tuple[Any, ...]  # leaves that are no tensors, None where a tensor belongs

    def rebuild(self, tensors: Tensors) -> Any:
        _check_count(tensors, len(self.constants))
        leaves = [
            constant if tensor is None else tensor
            for tensor, constant in zip(tensors, self.constants, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)


_TENSOR = PlainStructure(None)


def flatten(output: Any) -> tuple[Tensors, Structure]:
    """Return the tensors of an output (None where a leaf is no tensor), and its structure."""
    if isinstance(output, Tensor):
        return (output,), _TENSOR
    if type(output) is tuple:
        plain = _flatten_tuple(output)
        if plain is not None:
            return plain
    leaves, spec = pytree.tree_flatten(output)
    tensors = tuple(leaf if isinstance(leaf, Tensor) else None for leaf in leaves)
    constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return tensors, TreeStructure(spec, constants)


def _flatten_tuple(output: tuple[Any, ...]) -> tuple[Tensors, Structure] | None:
    tensors, widths = list[Tensor | None](), list[int | None]()
    for entry in output:
        if entry is None or isinstance(entry, Tensor):
            tensors.append(entry)
            widths.append(None)
        elif type(entry) is tuple and all(isinstance(part, Tensor) for part in entry):
            tensors.extend(entry)
            widths.append(len(entry))
        else:
            return None
    return tuple(tensors), PlainStructure(tuple(widths))


def _check_count(tensors: Tensors, expected: int) -> None:
    if len(tensors) != expected:
        raise TraceError(
            f"a policy returned {len(tensors)} tensors where the module returns {expected}"
        )
