"""Blocks of a denoiser, and who reads whom: found by tracing one forward on the meta device.

Every block's outputs and every input of the denoiser get an identity autograd function as a tag.
Walking the autograd graph back from each block's inputs, and from the denoiser's output, ends at
the nearest tags: those are the producers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, cast
from weakref import WeakKeyDictionary

import diffusers
import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils import _pytree as pytree

from dipgo_core.errors import TraceError
from dipgo_core.families import FAMILIES, Family, KnownModel
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse
from dipgo_core.hooks import Forward, Interceptor, MethodHook, bind_arguments, named_module
from dipgo_core.macs import MacsCounter

GRANULARITIES = ("block",)
_UNET_PATTERNS = FAMILIES["sd"].blocks


class _Tag(torch.autograd.Function):
    """Identity that leaves its number in the autograd graph."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, number: int) -> Tensor:
        ctx.number = number
        return tensor.clone()  # a view would refuse in-place additions by the next module

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("tags are read, never differentiated")


def _tag(value: Any, number: int) -> Any:
    def tag(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return _Tag.apply(leaf, number)
        return leaf

    return pytree.tree_map(tag, value)


@dataclass
class _Trace:
    """What one traced forward leaves behind; lists are indexed by block, 0 is the denoiser."""

    names: tuple[str, ...]
    counter: MacsCounter
    consumed: dict[int, list[Node]] = field(default_factory=dict)
    streams: dict[int, tuple[str, ...]] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)


def find_blocks(
    denoiser: nn.Module,
    *,
    inputs: Mapping[str, Any],
    names: Sequence[str] | None = None,
    granularity: str = "block",
) -> BlockGraph:
    """Trace a meta-device copy of `denoiser` into its block graph; the weights are not read.

    inputs: keyword arguments of one batch-1 forward (meta or real). names: modules to gate;
    by default the blocks of a U-Net, else the entries of the denoiser's own module lists.

    Raises:
        TraceError: no blocks, a block that runs not at all or twice, or that nothing reads.
    """
    if granularity not in GRANULARITIES:
        raise TraceError(f"granularity must be one of {', '.join(GRANULARITIES)}: {granularity!r}")
    twin = meta_copy(denoiser)
    names = tuple(names) if names is not None else block_names(twin)
    trace = _run_traced(twin, names, inputs)
    return _assemble(type(denoiser).__name__, granularity, trace)


def known_graph(known: KnownModel) -> BlockGraph:
    """Return the block graph of a known model from its config facts alone."""
    family = FAMILIES[known.family]
    with torch.device("meta"):
        denoiser = getattr(diffusers, family.denoiser)(**known.config)
    return trace_denoiser(denoiser, family, tokens=known.tokens)


def trace_denoiser(
    denoiser: nn.Module, family: Family, *, tokens: int, granularity: str = "block"
) -> BlockGraph:
    """Trace a family's denoiser at its own resolution, once in its life.

    Raises:
        TraceError: the denoiser's modules match none of the family's block names.
    """
    graphs = _traced.setdefault(denoiser, {})
    key = (tokens, granularity)
    if key not in graphs:
        names = _matching(denoiser, family.blocks)
        inputs = example_inputs(cast(Any, denoiser).config, family, tokens=tokens)
        graphs[key] = find_blocks(denoiser, inputs=inputs, names=names, granularity=granularity)
    return graphs[key]


_traced: WeakKeyDictionary[nn.Module, dict[tuple[int, str], BlockGraph]] = WeakKeyDictionary()


def example_inputs(config: Any, family: Family, *, tokens: int) -> dict[str, Any]:
    """Return forward arguments of one batch-1 call, on the meta device."""
    sample = _meta(1, config.in_channels, config.sample_size, config.sample_size)
    if family.conditioning == "label":
        labels = torch.zeros(1, dtype=torch.long, device="meta")
        return {"hidden_states": sample, "timestep": _meta(1), "class_labels": labels}
    states = _meta(1, tokens, config.cross_attention_dim)
    inputs: dict[str, Any] = {
        "sample": sample,
        "timestep": _meta(1),
        "encoder_hidden_states": states,
    }
    if config.addition_embed_type == "text_time":
        ids = 6
        pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": _meta(1, pooled), "time_ids": _meta(1, ids)}
    return inputs


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


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
        name
        for pattern in patterns
        for name, _ in denoiser.named_modules()
        if fnmatch(name, pattern) and name.count(".") == pattern.count(".")
    )
    if not names:
        raise TraceError(
            f"{type(denoiser).__name__} has no blocks to gate: it has neither down_blocks and "
            "up_blocks nor a list of blocks; name the modules"
        )
    return names


def _run_traced(twin: nn.Module, names: tuple[str, ...], inputs: Mapping[str, Any]) -> _Trace:
    trace = _Trace(names, MacsCounter())
    for module in twin.modules():
        if isinstance(module, nn.Embedding):  # integer inputs reach the output through these
            module.weight.requires_grad_(True)
    hooks = [
        MethodHook(named_module(twin, name), "forward", _tagging(trace, number))
        for number, name in enumerate(names, start=1)
    ]
    try:
        with torch.enable_grad(), torch.device("meta"), trace.counter:
            output = twin(**{name: _as_traced_input(v) for name, v in inputs.items()})
    finally:
        for hook in hooks:
            hook.remove()
    trace.consumed[0] = _nodes(output)
    return trace


def _as_traced_input(value: Any) -> Any:
    """A meta-device, differentiable, tagged copy of one argument."""

    def prepare(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if not leaf.is_floating_point():
            return leaf.to("meta")
        return torch.empty(leaf.shape, device="meta", requires_grad=True)

    return _tag(pytree.tree_map(prepare, value), INPUT)


def _tagging(trace: _Trace, number: int) -> Interceptor:
    def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number in trace.consumed:
            raise TraceError(
                f"block {trace.names[number - 1]} runs twice in one forward, so one gate cannot "
                "decide it; name finer or coarser modules"
            )
        trace.consumed[number] = _nodes((args, kwargs))
        trace.order.append(number)
        arguments = bind_arguments(original, args, kwargs)
        shapes = {k: v.shape for k, v in arguments.items() if isinstance(v, Tensor)}
        with trace.counter.owned_by(number):
            output = original(*args, **kwargs)
        trace.streams[number] = _match_streams(shapes, output)
        return _tag(output, number)

    return intercept


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


def _nodes(value: Any) -> list[Node]:
    leaves = pytree.tree_leaves(value)
    return [leaf.grad_fn for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn]


def _producers(starts: Sequence[Node]) -> set[int]:
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


def _assemble(denoiser: str, granularity: str, trace: _Trace) -> BlockGraph:
    position = {number: place for place, number in enumerate(trace.order, start=1)}
    idle = [name for n, name in enumerate(trace.names, start=1) if n not in position]
    if idle:
        raise TraceError(f"{denoiser}: blocks {', '.join(idle)} never run; leave them out")
    position |= {INPUT: INPUT}

    def producers(number: int) -> tuple[int, ...]:
        return tuple(sorted(position[p] for p in _producers(trace.consumed[number])))

    blocks = [_block("", 0, Reuse.SKIP, trace)]
    unet = any(fnmatch(name, pattern) for name in trace.names for pattern in _UNET_PATTERNS)
    for number in trace.order:
        residual = bool(trace.streams[number]) and not unet
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
