"""SuperNet: differentiable gates over the hooks, and the rollout through them with checkpointing.

Source: arXiv 2410.16942, section 3. A gated block gives the mixture of its cached and its current
output, and the next call caches that mixture. Gates are 0 or 1 forward; backward, a gate's
gradient is the derivative of the mixture.

Differs from the paper: a kept block that nothing live reads is forced to reuse, as in the SubNet
that is deployed. So a dead block costs nothing, and its gate gets no consistency gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from dipgo_core.config import SamplerSettings
from dipgo_core.graph import BlockGraph, Reuse
from dipgo_core.hooks import HookHandle, install
from dipgo_core.pipelines import LoadedModel
from dipgo_core.repeat import Repeat, RepeatAt, repeat_of
from dipgo_core.sampling import Batch, noise_scheduler, rollout
from dipgo_core.structures import Tensors

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

    `start` gives the gates of a run, `start_call` goes to a call. Every value that a mixture does
    not select is computed without gradient: it only enters the gate's own derivative.
    """

    def __init__(self, graph: BlockGraph, *, checkpointing: bool) -> None:
        self.graph = graph
        self.forwards = 0
        self._skip_gate = graph.skip_gate
        self._checkpointing = checkpointing

    def start(
        self, gates: Tensor, repeat: Repeat, cache: Mapping[int, Tensors] | None = None
    ) -> None:
        """Begin a run. gates: (T, N); repeat: what a skipped call gives again.

        cache: what a run that begins in the middle finds, by block; 0 is what a skip repeats.
        """
        self._gates, self._repeat = gates, repeat
        self._keeps = (gates.detach() >= 0.5).cpu().numpy()
        # the cache between calls, and how it is built
        self._flat, self._spec = pytree.tree_flatten(dict(cache or {}))
        self.start_call(0)

    def start_call(self, call: int) -> None:
        """Go to row `call` of the gates."""
        self._call = call

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        """Evaluate the call under its gates; only its caches outlive it, not its activations."""
        keep, spec_before, repeat = self._keeps[self._call], self._spec, self._repeat
        structure: pytree.TreeSpec | None = None

        def step(row: Tensor, *flat: Any) -> tuple[Any, ...]:
            nonlocal structure  # a repetition in the backward pass finds the same
            self.forwards += 1
            self._begin(row, keep, pytree.tree_unflatten(flat, spec_before))
            output = self._mixed(repeat.at(sample, timestep), compute)
            leaves, structure = pytree.tree_flatten((output, self.cache))
            return tuple(leaves)

        row = self._gates[self._call]
        if self._checkpointing:
            leaves = checkpoint(
                step, row, *self._flat, use_reentrant=False, preserve_rng_state=False
            )
        else:
            leaves = step(row, *self._flat)
        assert structure is not None
        output, cache = pytree.tree_unflatten(leaves, structure)
        self._flat, self._spec = pytree.tree_flatten(cache)
        return cast(Tensors, output)

    def _begin(self, row: Tensor, keep: Keep, cache: dict[int, Tensors]) -> None:
        self._row, self._keep, self.cache = row, keep, dict(cache)
        self._live = self.graph.live(keep)

    def _mixed(self, repeat: RepeatAt, compute: Callable[[], Tensors]) -> Tensors:
        """Return the mixture of this call's prediction and the repeated one; cache it."""
        gate, repeated = self._skip_gate, self.cache.get(0)
        if repeated is None:
            output = compute()
        else:
            current = compute() if self._keep[gate] else self._if_not_skipped(compute)
            output = mix(current, repeat.predictions(repeated), self._row[gate])
        self.cache[0] = repeat.repeatable(output)
        return output

    def _if_not_skipped(self, compute: Callable[[], Tensors]) -> Tensors:
        """Return what the call's other gates would give; as in a skip, no cache changes."""
        keep, live, cache = self._keep, self._live, dict(self.cache)
        self._keep = keep.copy()
        self._keep[self._skip_gate] = True
        self._live = self.graph.live(self._keep)
        try:
            with torch.no_grad():
                return compute()
        finally:
            self._keep, self._live, self.cache = keep, live, cache

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        if index == self._skip_gate:  # its gate decides the whole call
            return compute()
        if self.graph.blocks[index].reuse is Reuse.RESIDUAL:
            return self._residual(index, streams, compute)
        cached = self.cache.get(index)
        if cached is None:
            self.cache[index] = compute()
        elif not self._is_forced(index):
            self.cache[index] = mix(self._current(index, compute), cached, self._row[index])
        return self.cache[index]

    def _residual(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        """Cache out - in; a kept block's output is exactly what the module returned."""
        cached, gate = self.cache.get(index), self._row[index]
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
        self._policy = SoftGates(graph, checkpointing=checkpointing)
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

    def rollout(self, batch: Batch, sampler: SamplerSettings, gates: Tensor) -> Tensor:
        """Return what the pipeline would decode, differentiable in `gates`.  # (B, C, h, w)

        gates: (T, N), every value 0 or 1 (``pruner.straight_through``), the first row 1. With
        checkpointing over calls, what grows with T is the caches between calls, not activations.
        """
        self._policy.start(gates, repeat_of(noise_scheduler(self._model, sampler)))
        return rollout(self._model, batch, sampler, on_call=self._policy.start_call)
