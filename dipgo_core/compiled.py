"""Compiled blocks: torch.compile of what gates leave to compute; compiled code sees no gate.

Gates stay in Python, between the blocks. What is compiled is a block's own forward, whatever rows a
SubNet has: the number of compilations is bounded by the kinds of blocks, not by the rows. Blocks of
one class and the same parameters share a code object, other kinds have another: all variants of one
code object count against the limit of recompilations (8), beyond which PyTorch falls back silently.
Where most calls compute everything or nothing, those that compute everything run the whole denoiser
as one more kind: it has no gate either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dipgo_core.errors import SubNetError
from dipgo_core.hooks import Forward, unhooked

#: Modes of torch.compile that record CUDA graphs, and the one that differs in nothing else.
_GRAPH_MODES = {"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_GRAPH_OPTIONS = ("triton.cudagraphs", "triton.cudagraph_trees")


def block_compiler(denoiser: nn.Module, options: Mapping[str, Any]) -> BlockCompiler:
    """Return what compiles a denoiser's blocks, one for all its SubNets: no code holds a gate.

    Raises:
        SubNetError: the options ask for CUDA graphs.
    """
    known = _compilers.setdefault(denoiser, {})
    key = repr(sorted(options.items()))
    if key not in known:
        known[key] = BlockCompiler(options)
    return known[key]


class BlockCompiler:
    """Computes forwards by compiled code, one code object a kind of module.

    options: keyword arguments of torch.compile.

    Raises:
        SubNetError: the options ask for CUDA graphs.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        _check_options(options)
        self._options = options
        self._by_kind: dict[Any, Forward] = {}
        self._by_module: WeakKeyDictionary[nn.Module, Forward] = WeakKeyDictionary()

    def start_run(self) -> None:
        """Look at modules anew: since the last run, they may have got parameters (LoRA).

        Of a kind that was there before, nothing is compiled again.

        Raises:
            SubNetError: the settings of PyTorch ask for CUDA graphs by now.
        """
        _check_options(self._options)
        self._by_module.clear()

    @property
    def num_kinds(self) -> int:
        """How many code objects there are so far."""
        return len(self._by_kind)

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute one forward."""
        original = unhooked(original)
        args = tuple([_packed(value) for value in args])
        kwargs = {name: _packed(value) for name, value in kwargs.items()}
        module = getattr(original, "__self__", None)
        if not isinstance(module, nn.Module):  # wrapped by somebody: code of its own
            return self._of_kind(original)(original, args, kwargs)
        compiled = self._by_module.get(module)
        if compiled is None:
            compiled = self._by_module[module] = self._of_kind(_kind_of(original, module))
        return compiled(original, args, kwargs)

    @staticmethod
    def knows(original: Forward) -> bool:
        """Return whether a forward is a module's own, not one wrapped by somebody (offloading)."""
        return isinstance(getattr(unhooked(original), "__self__", None), nn.Module)

    def _of_kind(self, kind: Any) -> Forward:
        if kind not in self._by_kind:
            number = len(self._by_kind)
            self._by_kind[kind] = torch.compile(_copied(number), **self._options)
        return self._by_kind[kind]


_compilers: WeakKeyDictionary[nn.Module, dict[str, BlockCompiler]] = WeakKeyDictionary()


def _kind_of(forward: Any, module: nn.Module) -> tuple[Any, ...]:
    """Return what compiled code is specialised on: a module's code, sizes and settings."""
    parameters = tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())
    settings = tuple(
        (path, name, value)
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if value is None or type(value) in (bool, int, float, str)
    )
    return forward.__func__, type(module), parameters, settings


def _packed(value: Any) -> Any:
    """Return a tensor in one of the layouts that outputs have, whatever view it came as.

    A stream that passed reused blocks has another layout than one that was just computed.
    """
    if not isinstance(value, Tensor):
        return value
    if value.is_contiguous():
        sliced = value.ndim > 0 and value.shape[0] == 1 and value.stride(0) != value.numel()
        return value[0][None] if sliced else value  # of one image, a slice's stride is its whole's
    if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return value
    return value.contiguous()


def _call(forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _copied(number: int) -> Callable[..., Any]:
    """Return `_call` with a code object of its own: that is what compiled variants belong to."""
    code = _call.__code__.replace(co_name=f"gated_block_{number}")
    return FunctionType(code, _call.__globals__, code.co_name)


def _check_options(options: Mapping[str, Any]) -> None:
    mode = str(options.get("mode"))
    asked = [f"mode={mode!r}"] if mode in _GRAPH_MODES else []
    asked += [name for name in _GRAPH_OPTIONS if (options.get("options") or {}).get(name)]
    asked += ["backend='cudagraphs'"] if options.get("backend") == "cudagraphs" else []
    works = f"mode={_GRAPH_MODES.get(mode, 'default')!r}"
    if not asked and _is_asked_by_settings(options):
        asked = ["torch._inductor.config.triton.cudagraphs = True"]
        works = f"options={{{_GRAPH_OPTIONS[0]!r}: False}}"
    if asked:
        raise SubNetError(
            f"{asked[0]} records CUDA graphs: their outputs lie in memory that the next replay "
            "overwrites, and a SubNet keeps outputs from call to call. This works: "
            f"apply_subnet(pipe, subnet).compile({works})"
        )


def _is_asked_by_settings(options: Mapping[str, Any]) -> bool:
    """Return whether PyTorch's own settings (or environment) record graphs with these options."""
    if options.get("backend", "inductor") != "inductor":
        return False
    settings = import_module("torch._inductor.config").triton
    return bool((options.get("options") or {}).get(_GRAPH_OPTIONS[0], settings.cudagraphs))


def is_compiled(module: nn.Module) -> bool:
    """Return whether calls of a module run code of torch.compile."""
    return (
        getattr(module, "_compiled_call_impl", None) is not None
        or type(module).__name__ == "OptimizedModule"
    )


def check_uncompiled(denoiser: Any, attribute: str, names: Iterable[str]) -> None:
    """Refuse a denoiser whose compiled code would hold gates: its own, or that of a block.

    Submodules of blocks may be compiled. attribute: of the pipeline. names: of the blocks.

    Raises:
        SubNetError: compiled; says how to undo it and what to do instead.
    """
    around = {
        ".".join(name.split(".")[:end]) for name in names for end in range(name.count(".") + 2)
    }
    for name in sorted({"", *around}):
        module = _inside(denoiser, name)
        if module is None or not is_compiled(module):
            continue
        path = f"pipe.{attribute}{'.' if name else ''}{name}"
        undo = f"{path}._compiled_call_impl = None"
        if type(module).__name__ == "OptimizedModule":
            undo = f"{path} = {path}._orig_mod"
        raise SubNetError(
            f"{path} is compiled as a whole, and compiled code cannot follow gates that change "
            f"from call to call. This works: {undo}; apply_subnet(pipe, subnet).compile(), which "
            "compiles the blocks between the gates"
        )


def _inside(denoiser: nn.Module, name: str) -> nn.Module | None:
    try:
        return denoiser.get_submodule(name)
    except AttributeError:
        return None
