"""Blocks of a denoiser, and who reads whom: found by tracing one forward on the meta device.

Every block's outputs and every input of the denoiser get a tag. Walking the autograd graph back
from each block's inputs, and from the denoiser's output, ends at the nearest tags: those are the
producers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, cast, get_args
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks
from torch.utils import _pytree as pytree

from dipgo_core.config import Granularity
from dipgo_core.errors import TraceError
from dipgo_core.families import FAMILIES, Config, Family, KnownModel
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse
from dipgo_core.hooks import Forward, Interceptor, MethodHook, bind_arguments, named_module
from dipgo_core.macs import MacsCounter
from dipgo_core.meta import meta_copy, meta_inputs
from dipgo_core.tags import nodes_of, producers_of, tagged, tagged_input

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)
_UNET_PATTERNS = FAMILIES["sd"].blocks


@dataclass
class _Trace:
    """What one traced forward leaves behind; mappings are by block, 0 is the denoiser.

    declared: by block, the arguments its outputs continue, () where it is reused by output; None
    where nothing is declared, and shapes must tell.
    """

    names: tuple[str, ...]
    declared: Mapping[int, tuple[str, ...]] | None
    counter: MacsCounter
    consumed: dict[int, list[Node]] = field(default_factory=dict)
    streams: dict[int, tuple[str, ...]] = field(default_factory=dict)
    elements: dict[int, int] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)


def find_blocks(
    denoiser: nn.Module,
    *,
    inputs: Mapping[str, Any],
    names: Sequence[str] | None = None,
    streams: Mapping[str, tuple[str, ...]] | None = None,
    granularity: str = "block",
) -> BlockGraph:
    """Trace a meta-device copy of `denoiser` into its block graph; the weights are not read.

    A forward that looks at values is traced once more as it is, if the inputs have values.

    inputs: keyword arguments of one batch-1 forward (meta or real). names: modules to gate;
    by default the blocks of a U-Net, else the entries of the denoiser's own module lists.
    streams: by pattern of names, the arguments that the outputs continue (None: shapes tell).

    Raises:
        TraceError: no blocks, a block that runs not at all or twice, or that nothing reads.
    """
    known_granularity(granularity)
    twin = meta_copy(denoiser)
    names = tuple(names) if names is not None else block_names(twin)
    declared = None if streams is None else _declared(names, streams)
    try:
        trace = _run_traced(twin, _Trace(names, declared, MacsCounter()), inputs)
    except _NoValues:
        tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if any(tensor.is_meta for tensor in tensors):
            raise
        fresh = _Trace(names, declared, MacsCounter())
        trace = _run_traced(denoiser, fresh, inputs, real=True)
    return _assemble(type(denoiser).__name__, granularity, trace)


def _declared(
    names: Sequence[str], streams: Mapping[str, tuple[str, ...]]
) -> dict[int, tuple[str, ...]]:
    """Return the declared streams of each block, by its number in the order of names."""
    return {
        number: next((s for pattern, s in streams.items() if _fits(name, pattern)), ())
        for number, name in enumerate(names, start=1)
    }


def known_graph(known: KnownModel, granularity: str = "block") -> BlockGraph:
    """Return the block graph of a known model from its config facts alone."""
    family = FAMILIES[known.family]
    with torch.device("meta"):
        denoiser = getattr(diffusers, family.denoiser)(**known.config)
    return trace_denoiser(denoiser, family, tokens=known.tokens, granularity=granularity)


def trace_denoiser(
    denoiser: nn.Module,
    family: Family,
    *,
    tokens: int,
    side: int | None = None,
    granularity: str = "block",
    captured: Callable[[], Mapping[str, Any]] = dict,
) -> BlockGraph:
    """Trace a family's denoiser, once in its life for every size of its inputs.

    side: of the latents; None: as the model is made for. captured: gives the arguments of a call
    where the family does not know them.

    Raises:
        TraceError: the denoiser's modules match none of the family's names.
    """
    graphs = _traced.setdefault(denoiser, {})
    key = (tokens, side, granularity)
    if key not in graphs:
        graphs[key] = _trace_denoiser(denoiser, family, tokens, side, granularity, captured)
    return graphs[key]


def _trace_denoiser(
    denoiser: nn.Module,
    family: Family,
    tokens: int,
    side: int | None,
    granularity: str,
    captured: Callable[[], Mapping[str, Any]],
) -> BlockGraph:
    if known_granularity(granularity) not in family.granularities:
        raise TraceError(
            f"{family.pipeline} is in no family, so nothing is known of its layers: use the "
            "granularity block"
        )
    if not family.blocks:
        return find_blocks(denoiser, inputs=captured(), granularity=granularity)
    config = cast(Config, denoiser.config)
    side = family.latent_side(config) if side is None else side
    return find_blocks(
        denoiser,
        inputs=meta_inputs(family.inputs(config, side, tokens)),
        names=_matching(denoiser, family.patterns(known_granularity(granularity))),
        streams=family.streams,
        granularity=granularity,
    )


def known_granularity(name: str) -> Granularity:
    """Return `name` as a granularity.

    Raises:
        TraceError: there is none of this name.
    """
    for granularity in GRANULARITIES:
        if granularity == name:
            return granularity
    raise TraceError(f"granularity must be one of {', '.join(GRANULARITIES)}, got {name!r}")


_traced: WeakKeyDictionary[nn.Module, dict[tuple[int, int | None, str], BlockGraph]] = (
    WeakKeyDictionary()
)


def block_names(denoiser: nn.Module) -> tuple[str, ...]:
    """Return the modules to gate: a U-Net's blocks, else entries of the denoiser's module lists.

    Raises:
        TraceError: the denoiser has neither.
    """
    if hasattr(denoiser, "down_blocks") and hasattr(denoiser, "up_blocks"):
        return _matching(denoiser, _UNET_PATTERNS)
    lists = [n for n, child in denoiser.named_children() if isinstance(child, nn.ModuleList)]
    return _matching(denoiser, [f"{name}.*" for name in lists])


def _matching(denoiser: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Modules whose name matches a pattern part by part, in the order of definition."""
    names = tuple(
        name for pattern in patterns for name, _ in denoiser.named_modules() if _fits(name, pattern)
    )
    if not names:
        raise TraceError(
            f"{type(denoiser).__name__} has no blocks to gate: it has neither down_blocks and "
            "up_blocks nor a list of blocks; name the modules"
        )
    return names


def _fits(name: str, pattern: str) -> bool:
    return name.count(".") == pattern.count(".") and fnmatch(name, pattern)


class _NoValues(TraceError):
    """A forward looks at values, of which a tensor on the meta device has none."""


def _run_traced(
    denoiser: nn.Module, trace: _Trace, inputs: Mapping[str, Any], *, real: bool = False
) -> _Trace:
    """Run one forward; real: with weights and values, else with neither."""
    hooks = [
        MethodHook(named_module(denoiser, name), "forward", _tagging(trace, number))
        for number, name in enumerate(trace.names, start=1)
    ]
    place = nullcontext() if real else torch.device("meta")
    try:
        with _only_embeddings_differ(denoiser), torch.enable_grad(), place, trace.counter:
            output = denoiser(**{k: tagged_input(v, real=real) for k, v in inputs.items()})
    except (NotImplementedError, RuntimeError) as error:
        raise _NoValues(f"{type(denoiser).__name__} cannot be traced: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    trace.consumed[0] = nodes_of(output)
    trace.elements[0] = _elements(output)
    return trace


@contextmanager
def _only_embeddings_differ(denoiser: nn.Module) -> Iterator[None]:
    """Let the autograd graph reach back to inputs and embeddings, and keep no activation for it.

    Integer inputs reach the output through embeddings; other weights are no input.
    """
    before = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    denoiser.requires_grad_(False)
    for module in denoiser.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(True)
    try:
        with saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
            yield
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)


def _tagging(trace: _Trace, number: int) -> Interceptor:
    def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number in trace.consumed:
            raise TraceError(
                f"block {trace.names[number - 1]} runs twice in one forward, so one gate cannot "
                "decide it; name finer or coarser modules"
            )
        trace.consumed[number] = nodes_of((args, kwargs))
        trace.order.append(number)
        with trace.counter.owned_by(number):
            output = original(*args, **kwargs)
        arguments = bind_arguments(original, args, kwargs)
        trace.streams[number] = _streams_of(trace, number, arguments, output)
        trace.elements[number] = _elements(output)
        return tagged(output, number)

    return intercept


def _streams_of(
    trace: _Trace, number: int, arguments: Mapping[str, Any], output: Any
) -> tuple[str, ...]:
    shapes = {k: v.shape for k, v in arguments.items() if isinstance(v, Tensor)}
    if trace.declared is None:
        return _match_streams(shapes, output)
    declared = trace.declared[number]
    leaves = pytree.tree_leaves(output)
    fits = len(leaves) == len(declared) and all(
        shapes.get(name) == leaf.shape
        for name, leaf in zip(declared, leaves, strict=True)
        if isinstance(leaf, Tensor)
    )
    if declared and not fits:
        raise TraceError(
            f"block {trace.names[number - 1]} does not continue its arguments "
            f"{', '.join(declared)}: its outputs differ in number or shape; correct the family"
        )
    return tuple(
        name if isinstance(leaf, Tensor) else ""
        for name, leaf in zip(declared, leaves, strict=False)
    )


def _match_streams(shapes: Mapping[str, torch.Size], output: Any) -> tuple[str, ...]:
    """Return which argument each output tensor continues, or () where that is not one to one."""
    streams: list[str] = []
    for leaf in pytree.tree_leaves(output):
        if not isinstance(leaf, Tensor):
            streams.append("")
            continue
        fitting = [k for k, shape in shapes.items() if shape == leaf.shape and k not in streams]
        single = [k for k in fitting if k == "hidden_states"] or fitting[:1]
        if not fitting or (len(fitting) > 1 and len(pytree.tree_leaves(output)) > 1):
            return ()
        streams.append(single[0])
    return tuple(streams)


def _elements(output: Any) -> int:
    """Count numbers, those of a tensor that is returned twice (down blocks do) once."""
    leaves = {id(leaf): leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)}
    return sum(leaf.numel() for leaf in leaves.values())


def _assemble(denoiser: str, granularity: str, trace: _Trace) -> BlockGraph:
    position = {number: place for place, number in enumerate(trace.order, start=1)}
    idle = [name for n, name in enumerate(trace.names, start=1) if n not in position]
    if idle:
        raise TraceError(f"{denoiser}: blocks {', '.join(idle)} never run; leave them out")
    position |= {INPUT: INPUT}

    def producers(number: int) -> tuple[int, ...]:
        return tuple(sorted(position[p] for p in producers_of(trace.consumed[number])))

    unet = any(_fits(name, pattern) for name in trace.names for pattern in _UNET_PATTERNS)
    by_shape = trace.declared is None and unet  # a U-Net's blocks cut their inputs all the same
    blocks = [_block("", 0, Reuse.SKIP, trace)]
    for number in trace.order:
        residual = bool(trace.streams[number]) and not by_shape
        reuse = Reuse.RESIDUAL if residual else Reuse.OUTPUT
        blocks.append(_block(trace.names[number - 1], number, reuse, trace))
    edges = tuple(producers(number) for number in (0, *trace.order))
    graph = BlockGraph(denoiser, granularity, tuple(blocks), edges)
    _check(graph)
    return graph


def _block(name: str, number: int, reuse: Reuse, trace: _Trace) -> Block:
    return Block(
        name,
        reuse,
        trace.counter.all[number],
        trace.counter.paper[number],
        trace.streams[number] if reuse is Reuse.RESIDUAL else (),
        trace.elements[number],
    )


def _check(graph: BlockGraph) -> None:
    """Raise unless the output is computed from blocks, and every block has a part in it."""
    if not any(p != INPUT for p in graph.producers[0]):
        raise TraceError(f"the output of {graph.denoiser} depends on none of its blocks")
    sourceless = [graph.names[n] for n in range(graph.num_blocks) if not graph.producers[n]]
    read = {p for producers in graph.producers for p in producers}
    unread = [graph.names[n] for n in range(1, graph.num_blocks) if n not in read]
    for names, what in ((sourceless, "read nothing"), (unread, "are read by nobody")):
        if names:
            raise TraceError(
                f"{graph.denoiser}: blocks {', '.join(names)} {what} that depends on the inputs; "
                "gate other modules"
            )
