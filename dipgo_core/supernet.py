"""SuperNet: differentiable gates over the hooks, and the rollout through them with checkpointing.

Source: arXiv 2410.16942, section 3. A gated block gives the mixture of its cached and its current
output, and the next call caches that mixture. Gates are 0 or 1 forward; backward, a gate's
gradient is the derivative of the mixture.

Differs from the paper: a kept block that nothing live reads is forced to reuse, as in the SubNet
that is deployed. So a dead block costs nothing, and its gate gets no consistency gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dipgo_core.config import SamplerSettings
from dipgo_core.graph import BlockGraph, Reuse
from dipgo_core.hooks import HookHandle, Tensors, install
from dipgo_core.pipelines import Conditioning, LoadedModel, predict, rollout

Keep = npt.NDArray[np.bool_]


class Mixture(torch.autograd.Function):
    """where(gate, current, cached) forward; d gate = sum(grad * (current - cached)) backward.

    The side that is not selected never enters the forward arithmetic, so a value that overflows
    there costs nothing; where the two differ by infinity or NaN, that element counts 0.
    """

    @staticmethod
    def forward(ctx: Any, current: Tensor, cached: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(current, cached, gate)
        return torch.where(gate >= 0.5, current, cached)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        current, cached, gate = ctx.saved_tensors
        (grad,) = grads
        keep, zero = gate >= 0.5, grad.new_zeros(())
        d_gate = None
        if ctx.needs_input_grad[2]:
            wide = torch.promote_types(grad.dtype, torch.float32)
            change = current.to(wide) - cached.to(wide)
            change = change.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
            d_gate = (grad.to(wide) * change).sum().to(gate.dtype)  # a broken grad stays visible
        return torch.where(keep, grad, zero), torch.where(keep, zero, grad), d_gate


def mix(current: Tensors, cached: Tensors, gate: Tensor) -> Tensors:
    """Mix tensor by tensor; where a module returned no tensor there is none."""
    return tuple(
        None if now is None or before is None else cast(Tensor, Mixture.apply(now, before, gate))
        for now, before in zip(current, cached, strict=True)
    )


class SoftGates:
    """The policy of training: one gate a block, mixtures instead of choices.

    `begin` sets the state of one call. Every value a mixture does not select is computed without
    gradient: it only enters the gate's own derivative.
    """

    def __init__(self, graph: BlockGraph) -> None:
        self.graph = graph
        self.decides_skip = 0 in graph.searched
        self.cache: dict[int, Tensors] = {}
        self.forwards = 0
        self._gates = torch.ones(graph.num_blocks)
        self._keep = self._live = np.ones(graph.num_blocks, dtype=np.bool_)

    def begin(self, gates: Tensor, keep: Keep, cache: dict[int, Tensors]) -> None:
        """Start a call. gates: (N,); keep: their hard values; cache: empty for the first call."""
        self._gates, self._keep, self.cache = gates, keep, dict(cache)
        self._live = self.graph.live(keep)

    def denoiser(self, sample: Tensor, compute: Callable[[], Tensors]) -> Tensors:
        self.forwards += 1
        cached = self.cache.get(0)
        if cached is None or not self.decides_skip:
            output = compute()
        else:
            current = compute() if self._keep[0] else self._if_not_skipped(compute)
            output = mix(current, cached, self._gates[0])
        if self.decides_skip:
            self.cache[0] = output
        return output

    def _if_not_skipped(self, compute: Callable[[], Tensors]) -> Tensors:
        """Return what the call's own block gates would give; as in a skip, no cache changes."""
        keep, live, cache = self._keep, self._live, dict(self.cache)
        self._keep = keep.copy()
        self._keep[0] = True
        self._live = self.graph.live(self._keep)
        try:
            with torch.no_grad():
                return compute()
        finally:
            self._keep, self._live, self.cache = keep, live, cache

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        if self.graph.blocks[index].reuse is Reuse.RESIDUAL:
            return self._residual(index, streams, compute)
        cached = self.cache.get(index)
        if cached is None:
            self.cache[index] = compute()
        elif not self._is_forced(index):
            self.cache[index] = mix(self._current(index, compute), cached, self._gates[index])
        return self.cache[index]

    def _residual(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        """Cache out - in; a kept block's output is exactly what the module returned."""
        cached, gate = self.cache.get(index), self._gates[index]
        if cached is None:
            output = compute()
            self.cache[index] = _subtract(output, streams)
            return output
        if self._is_forced(index):
            return _add(streams, cached)
        current = self._current(index, compute)
        if self._keep[index]:
            output = mix(current, _add(streams, cached), gate)
            self.cache[index] = _subtract(output, streams)
            return output
        self.cache[index] = mix(_detach(_subtract(current, streams)), cached, gate)
        return _add(streams, self.cache[index])

    def _is_forced(self, index: int) -> bool:
        """Return whether the block's own gate decides nothing: it would be dead even if kept."""
        if self._live[index]:
            return False
        kept = self._keep.copy()
        kept[index] = True
        return not self.graph.live(kept)[index]

    def _current(self, index: int, compute: Callable[[], Tensors]) -> Tensors:
        if self._keep[index]:
            return compute()
        with torch.no_grad():
            return compute()


def _subtract(a: Tensors, b: Tensors) -> Tensors:
    pairs = zip(a, b, strict=True)
    return tuple(None if x is None or y is None else x - y for x, y in pairs)


def _add(a: Tensors, b: Tensors) -> Tensors:
    pairs = zip(a, b, strict=True)
    return tuple(None if x is None or y is None else x + y for x, y in pairs)


def _detach(tensors: Tensors) -> Tensors:
    return tuple(None if x is None else x.detach() for x in tensors)


class SuperNet:
    """A model with soft gates installed for as long as the `with` block lasts.

    The backward pass must run inside the block too: checkpointing evaluates the denoiser again.
    """

    def __init__(
        self, model: LoadedModel, graph: BlockGraph, *, checkpointing: bool = True
    ) -> None:
        self._model = model
        self._policy = SoftGates(graph)
        self._checkpointing = checkpointing
        self._handle: HookHandle | None = None

    def __enter__(self) -> SuperNet:
        self._handle = install(self._model.denoiser, self._policy.graph, self._policy)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    @property
    def forwards(self) -> int:
        """Denoiser forwards so far, a batch counted as one, repeated ones included."""
        return self._policy.forwards

    def rollout(
        self, conditioning: Conditioning, latents: Tensor, sampler: SamplerSettings, gates: Tensor
    ) -> Tensor:
        """Return the final latents, differentiable in `gates`.  # (B, C, h, w)

        gates: (T, N), every value 0 or 1 (``pruner.straight_through``), the first row 1. With
        checkpointing over calls, what grows with T is the caches between calls, not activations.
        """
        keep = (gates.detach() >= 0.5).cpu().numpy()
        flat_cache: list[Any] = []
        spec = pytree.tree_flatten({})[1]

        def predictor(call: int, model_input: Tensor, timestep: Tensor) -> Tensor:
            nonlocal flat_cache, spec
            spec_before = spec

            def step(model_input: Tensor, row: Tensor, *flat: Any) -> tuple[Any, ...]:
                nonlocal spec  # a repetition in the backward pass finds the same structure
                self._policy.begin(row, keep[call], pytree.tree_unflatten(flat, spec_before))
                prediction = predict(self._model, conditioning, model_input, timestep)
                values, spec = pytree.tree_flatten(self._policy.cache)
                return prediction, *values

            prediction, *flat_cache = self._run(step, model_input, gates[call], *flat_cache)
            return cast(Tensor, prediction)

        return rollout(self._model, conditioning, latents, sampler, predictor=predictor)

    def _run(self, step: Callable[..., tuple[Any, ...]], *arguments: Any) -> tuple[Any, ...]:
        if not self._checkpointing:
            return step(*arguments)
        return checkpoint(step, *arguments, use_reentrant=False, preserve_rng_state=False)
