"""Hooks: the only code that touches a model's forward.

A policy decides at every forward of the denoiser and of each block whether the real module runs;
the hooks flatten outputs and rebuild their structure, so that a policy sees only tensors.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from dipgo_core.errors import SubNetError, TraceError
from dipgo_core.graph import BlockGraph
from dipgo_core.structures import Structure, Tensors, flatten

logger = logging.getLogger(__name__)

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


#: Gives the policy of the moment, or None while nothing is to be decided.
Current = Callable[[], Policy | None]


class MethodHook:
    """One wrapped method of one instance; `remove()` puts back exactly what was there.

    A deep copy of the instance has the plain method, bound to itself.
    """

    def __init__(self, owner: Any, name: str, intercept: Interceptor) -> None:
        self.owner = owner
        self._name = name
        self._place = _Place(intercept, getattr(owner, name), vars(owner).get(name))
        self._method = _stand_in(self._place)
        vars(owner)[name] = self._method

    def is_reached(self) -> bool:
        """Return whether the owner's method still leads here, through wrappers put around ours."""
        method = vars(self.owner).get(self._name)
        while method is not None and method is not self._method:
            place = _place_of(method)
            method = place.original if place else getattr(method, "__wrapped__", None)
        return method is not None

    def renewed(self) -> MethodHook:
        """Return this hook, or a new one in its place if something else displaced it."""
        if self.is_reached():
            return self
        self.remove()
        return MethodHook(self.owner, self._name, self._place.intercept)

    def remove(self) -> None:
        """Restore the method; a wrapper put around ours later stays and finds ours inert.

        Where such a wrapper keeps ours as an attribute of the owner (accelerate's
        ``_old_forward``), it gets back what it would have found there.
        """
        self._place.active = False
        members = vars(self.owner)
        before = self._before()
        for name in [name for name, value in members.items() if value is self._method]:
            if name != self._name:
                members[name] = self._place.original if before is None else before
            elif before is None:
                del members[name]
            else:
                members[name] = before

    def _before(self) -> Any:
        """Return what was there before: not one of our own that was removed meanwhile."""
        method = self._place.previous
        while (place := _place_of(method)) is not None and not place.active:
            method = place.previous
        return method


@dataclass(eq=False)
class _Place:
    """Where a method was: what is done there now, the method, and what the instance itself had.

    A copy does nothing: its method is the copied instance's.
    """

    intercept: Interceptor
    original: Forward
    previous: Any
    active: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        return _Place(directly, copy.deepcopy(self.original, memo), None, active=False)


def _stand_in(place: _Place) -> MethodType:
    """Return what stands in for a method: a method itself, for a closure is shared by copies.

    Compiled code is tied to a method's function alone, not to its object. The original's signature
    stays visible to inspect.
    """
    entered: Any = FunctionType(_entered.__code__, globals(), "entered")
    functools.update_wrapper(entered, _with_self(place.original))
    return MethodType(entered, place)


def _entered(place: _Place, /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling() or not place.active:  # no gates there
        return place.original(*args, **kwargs)
    return place.intercept(place.original, args, kwargs)


def _with_self(forward: Forward) -> Any:
    """Return a function that has a first parameter more than a method, as its own function has."""
    if isinstance(forward, MethodType):
        return forward.__func__

    @functools.wraps(forward)
    def unbound(self: object, *args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    seen = inspect.signature(forward)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    vars(unbound)["__signature__"] = seen.replace(parameters=[first, *seen.parameters.values()])
    return unbound


def _place_of(method: Any) -> _Place | None:
    place = method.__self__ if isinstance(method, MethodType) else None
    return place if isinstance(place, _Place) else None


def unhooked(forward: Forward) -> Forward:
    """Return what a forward is without the hooks of ours that lie on it."""
    while (place := _place_of(forward)) is not None:
        forward = place.original
    return forward


def directly(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute a forward as it is: an Interceptor that does nothing."""
    return original(*args, **kwargs)


class HookHandle:
    """The way back from `install` and `attach`; compiled: whether blocks are computed so."""

    def __init__(
        self, denoiser: nn.Module, hooks: dict[str, tuple[MethodHook, Interceptor]], always: bool
    ) -> None:
        self.always = always
        self.compiled = False
        self._denoiser = denoiser
        self._hooks = hooks  # by name of the module, "" the denoiser
        vars(denoiser).setdefault(_HOOKS, _Handles([])).items.append(self)

    @property
    def num_blocks(self) -> int:
        return len(self._hooks) - 1

    def renew(self) -> None:
        """Hook again what was displaced, or replaced by another module, since.

        Raises:
            TraceError: a block is gone.
        """
        for name, (hook, intercept) in self._hooks.items():
            module = named_module(self._denoiser, name)
            if hook.owner is module:
                self._hooks[name] = (hook.renewed(), intercept)
            else:
                hook.remove()
                self._hooks[name] = (MethodHook(module, "forward", intercept), intercept)

    def remove(self) -> None:
        """Restore every forward; a second call does nothing."""
        for hook, _ in self._hooks.values():
            hook.remove()
        handles = _handles_on(self._denoiser)
        if self in handles:
            handles.remove(self)
            if not handles:
                del vars(self._denoiser)[_HOOKS]


_HOOKS = "_dipgo_hooks"  # attribute of a denoiser


@dataclass(frozen=True)
class _Handles:
    """The handles of hooks on a denoiser; a copy of the denoiser has no hooks."""

    items: list[HookHandle]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Handles:
        return _Handles([])


def _handles_on(denoiser: nn.Module) -> list[HookHandle]:
    found = vars(denoiser).get(_HOOKS)
    return [] if found is None else cast(_Handles, found).items


def is_hooked(denoiser: nn.Module) -> bool:
    """Return whether hooks of ours are on this denoiser."""
    return bool(_handles_on(denoiser))


def is_installed(denoiser: nn.Module) -> bool:
    """Return whether a policy of `install` decides every forward of this denoiser."""
    return any(handle.always for handle in _handles_on(denoiser))


def computes_compiled(denoiser: nn.Module) -> bool:
    """Return whether hooks on this denoiser compute its blocks by compiled code."""
    return any(handle.compiled for handle in _handles_on(denoiser))


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
    deciding = Deciding(lambda: policy)
    return _hooked(denoiser, graph, deciding, deciding, always=True)


@dataclass(frozen=True)
class Deciding:
    """Who decides the forwards of some modules, and how those that are to run are computed."""

    current: Current
    compute: Interceptor = directly


def attach(denoiser: nn.Module, graph: BlockGraph, whole: Deciding, blocks: Deciding) -> HookHandle:
    """Let the policies that `current` gives decide forwards; where it gives none, nothing does.

    Hooks of several owners may lie on one denoiser, as long as one at a time has a policy.
    whole: of the denoiser. blocks: of the graph's blocks.

    Raises:
        TraceError: a block of the graph is not a module of this denoiser.
    """
    return _hooked(denoiser, graph, whole, blocks, always=False)


def _hooked(
    denoiser: nn.Module, graph: BlockGraph, whole: Deciding, blocks: Deciding, *, always: bool
) -> HookHandle:
    intercepts = {"": _denoiser_interceptor(denoiser, whole)}
    for index, block in enumerate(graph.blocks[1:], start=1):
        module = named_module(denoiser, block.name)
        intercepts[block.name] = _block_interceptor(module, index, graph, blocks)
    hooks = {
        name: (MethodHook(named_module(denoiser, name), "forward", intercept), intercept)
        for name, intercept in intercepts.items()
    }
    handle = HookHandle(denoiser, hooks, always)
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


def argument_reader(
    forward: Forward, name: str | None = None
) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return a function of args and kwargs that gives one argument, None where there is none.

    name: of the forward's parameter; None for the first.
    """
    names = list(inspect.signature(forward).parameters)
    name = names[0] if name is None else name
    place = names.index(name) if name in names else len(names)

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args[place] if place < len(args) else kwargs.get(name)

    return read


def _denoiser_interceptor(denoiser: nn.Module, deciding: Deciding) -> Interceptor:
    structures: dict[Any, Structure] = {}  # by return_dict
    name = type(denoiser).__name__
    sample_of = argument_reader(denoiser.forward)
    timestep_of = argument_reader(denoiser.forward, "timestep")
    form_of = argument_reader(denoiser.forward, "return_dict")

    def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        policy = deciding.current()
        if policy is None:
            return original(*args, **kwargs)
        form = form_of(args, kwargs)
        output: Any = None
        computed: Tensors | None = None

        def compute() -> Tensors:
            nonlocal output, computed
            output = deciding.compute(original, args, kwargs)
            computed, structures[form] = flatten(output)
            return computed

        tensors = policy.denoiser(sample_of(args, kwargs), timestep_of(args, kwargs), compute)
        if tensors is computed:
            return output
        if form not in structures:
            raise SubNetError(
                f"{name} was skipped before it was ever computed with return_dict={form}; compute "
                "the first call whole"
            )
        return structures[form].rebuild(tensors)

    return intercept


def _block_interceptor(
    module: nn.Module, index: int, graph: BlockGraph, deciding: Deciding
) -> Interceptor:
    block = graph.blocks[index]
    structure: Structure | None = None
    readers = [argument_reader(module.forward, name) for name in block.streams]

    def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal structure
        policy = deciding.current()
        if policy is None:
            return original(*args, **kwargs)
        output: Any = None
        computed: Tensors | None = None

        def compute() -> Tensors:
            nonlocal structure, output, computed
            output = deciding.compute(original, args, kwargs)
            computed, structure = flatten(output)
            return computed

        streams = tuple([read(args, kwargs) for read in readers])
        tensors = policy.block(index, streams, compute)
        if tensors is computed:
            return output
        if structure is None:
            raise SubNetError(f"block {block.name} was reused before it was ever computed")
        return structure.rebuild(tensors)

    return intercept
