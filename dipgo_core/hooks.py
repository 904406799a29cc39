"""Hooks: the only code that touches a model's forward.

A policy decides at every forward of the denoiser and of each block whether the real module runs;
the hooks flatten outputs and rebuild their structure, so that a policy sees only tensors.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dipgo_core.errors import SubNetError, TraceError
from dipgo_core.graph import BlockGraph

logger = logging.getLogger(__name__)

Tensors = tuple[Tensor | None, ...]
Forward = Callable[..., Any]
#: Gets the original forward, its positional and its keyword arguments; returns the module's output.
Interceptor = Callable[[Forward, tuple[Any, ...], dict[str, Any]], Any]


class Policy(Protocol):
    """Decides at every forward. `compute()` runs the real module, returns its tensors flattened."""

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        """Return the denoiser's output tensors; without `compute()`, the call is skipped.

        timestep: the forward's argument of that name, a number or a tensor; None without one.
        """

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        """Return the output tensors of ``graph.blocks[index]``.

        streams: for residual blocks the inputs that match the outputs one to one, else ().
        """


@dataclass(frozen=True)
class Structure:
    """How an output is built around its tensors."""

    spec: pytree.TreeSpec
    constants: tuple[Any, ...]  # leaves that are no tensors, None where a tensor belongs

    @classmethod
    def flatten(cls, output: Any) -> tuple[Tensors, Structure]:
        leaves, spec = pytree.tree_flatten(output)
        tensors = tuple(leaf if isinstance(leaf, Tensor) else None for leaf in leaves)
        constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        return tensors, cls(spec, constants)

    def rebuild(self, tensors: Tensors) -> Any:
        if len(tensors) != len(self.constants):
            raise TraceError(
                f"a policy returned {len(tensors)} tensors where the module returns "
                f"{len(self.constants)}"
            )
        leaves = [
            constant if tensor is None else tensor
            for tensor, constant in zip(tensors, self.constants, strict=True)
        ]
        return pytree.tree_unflatten(leaves, self.spec)


class MethodHook:
    """One wrapped method of one instance; `remove()` puts back exactly what was there."""

    def __init__(self, owner: Any, name: str, intercept: Interceptor) -> None:
        self._owner = owner
        self._name = name
        self._previous = vars(owner).get(name)
        self._active = True
        original = getattr(owner, name)

        @functools.wraps(original)  # keeps the signature visible to inspect
        def method(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return original(*args, **kwargs)
            return intercept(original, args, kwargs)

        self._method = method
        vars(owner)[name] = method

    def remove(self) -> None:
        """Restore the method; a wrapper put around ours later stays and finds ours inert."""
        self._active = False
        if vars(self._owner).get(self._name) is not self._method:
            return
        if self._previous is None:
            del vars(self._owner)[self._name]
        else:
            vars(self._owner)[self._name] = self._previous


class HookHandle:
    """The way back from `install`."""

    def __init__(self, denoiser: nn.Module, hooks: list[MethodHook]) -> None:
        self._denoiser = denoiser
        self._hooks = hooks

    @property
    def num_blocks(self) -> int:
        return len(self._hooks) - 1

    def remove(self) -> None:
        """Restore every forward; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        if self._denoiser.__dict__.get("_dipgo_hooks") is self:
            del self._denoiser.__dict__["_dipgo_hooks"]


def is_hooked(denoiser: nn.Module) -> bool:
    """Return whether `install` has hooks on this denoiser."""
    return "_dipgo_hooks" in denoiser.__dict__


def install(denoiser: nn.Module, graph: BlockGraph, policy: Policy) -> HookHandle:
    """Let `policy` decide every forward of the denoiser and of the graph's blocks.

    Raises:
        SubNetError: the denoiser is hooked already.
        TraceError: a block of the graph is not a module of this denoiser.
    """
    if is_hooked(denoiser):
        raise SubNetError(
            f"{type(denoiser).__name__} has gates installed already; call remove() on the first "
            "handle"
        )
    modules = [named_module(denoiser, block.name) for block in graph.blocks[1:]]
    hooks = [MethodHook(denoiser, "forward", _denoiser_interceptor(denoiser, policy))]
    for index, module in enumerate(modules, start=1):
        hooks.append(
            MethodHook(module, "forward", _block_interceptor(module, index, graph, policy))
        )
    handle = HookHandle(denoiser, hooks)
    denoiser.__dict__["_dipgo_hooks"] = handle
    logger.debug("hooked %d blocks of %s", handle.num_blocks, type(denoiser).__name__)
    return handle


def named_module(denoiser: nn.Module, name: str) -> nn.Module:
    """Return the submodule called `name`.

    Raises:
        TraceError: there is none.
    """
    try:
        return denoiser.get_submodule(name)
    except AttributeError as error:
        raise TraceError(
            f"{type(denoiser).__name__} has no block {name!r}; the block graph belongs to another "
            "model"
        ) from error


def bind_arguments(
    forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a forward by parameter name (``**kwargs`` merged in)."""
    arguments: dict[str, Any] = {}
    for name, value in inspect.signature(forward).bind(*args, **kwargs).arguments.items():
        arguments.update(value if name == "kwargs" else {name: value})
    return arguments


def _denoiser_interceptor(denoiser: nn.Module, policy: Policy) -> Interceptor:
    structures: dict[Any, Structure] = {}  # by return_dict
    names = list(inspect.signature(denoiser.forward).parameters)

    def argument(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        place = names.index(name) if name in names else len(args)
        return args[place] if place < len(args) else None

    def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        form = kwargs.get("return_dict")

        def compute() -> Tensors:
            tensors, structures[form] = Structure.flatten(original(*args, **kwargs))
            return tensors

        sample, timestep = (argument(name, args, kwargs) for name in (names[0], "timestep"))
        tensors = policy.denoiser(sample, timestep, compute)
        if form not in structures:
            raise SubNetError(
                f"{type(denoiser).__name__} was skipped before it was ever computed with "
                f"return_dict={form}; compute the first call whole"
            )
        return structures[form].rebuild(tensors)

    return intercept


def _block_interceptor(
    module: nn.Module, index: int, graph: BlockGraph, policy: Policy
) -> Interceptor:
    block = graph.blocks[index]
    structure: Structure | None = None
    position = {name: i for i, name in enumerate(inspect.signature(module.forward).parameters)}

    def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal structure

        def compute() -> Tensors:
            nonlocal structure
            tensors, structure = Structure.flatten(original(*args, **kwargs))
            return tensors

        streams = tuple(
            None if name == "" else kwargs[name] if name in kwargs else args[position[name]]
            for name in block.streams
        )
        tensors = policy.block(index, streams, compute)
        if structure is None:
            raise SubNetError(f"block {block.name} was reused before it was ever computed")
        return structure.rebuild(tensors)

    return intercept
