"""A SubNet run by torch's own hooks that compute everything and replace outputs: an oracle.

Slow and obvious: nothing is skipped, dead or freed. A reused block's output is replaced by what it
last gave (or by its input plus what it last added), a skipped call's prediction by the last noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dipgo_core.graph import BlockGraph, Reuse


class _Naive:
    def __init__(self, graph: BlockGraph, keep: Any, scheduler: Any, first: int) -> None:
        self.graph, self.keep, self.scheduler = graph, keep, scheduler
        self.row, self.first, self.forward = first, first, 0
        self.last: dict[tuple[int, int], Any] = {}  # by forward of the step and block
        self.shape: dict[int, Any] = {}
        self.whole = True

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        shape = _arguments(module, args, kwargs)[0].shape
        self.whole = self.row == self.first or self.shape.get(self.forward) != shape
        self.shape[self.forward] = shape

    def kept(self, index: int) -> bool:
        return self.whole or bool(self.keep[self.row, index])

    def block(self, index: int) -> Any:
        streams = self.graph.blocks[index].streams
        residual = self.graph.blocks[index].reuse is Reuse.RESIDUAL

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            names = list(inspect.signature(module.forward).parameters)
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            inputs = [given.get(name) for name in streams]
            leaves, spec = pytree.tree_flatten(output)
            key = (self.forward, index)
            if self.kept(index):
                pairs = zip(leaves, inputs or leaves, strict=True)
                self.last[key] = [
                    None if a is None else (a - b if residual else a.clone()) for a, b in pairs
                ]
                return output
            again = self.last[key]
            if residual:
                again = [None if c is None else i + c for i, c in zip(inputs, again, strict=True)]
            return pytree.tree_unflatten([a if a is None else a.clone() for a in again], spec)

        return hook

    def denoiser(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        sample, timestep = _arguments(module, args, kwargs)
        leaves, spec = pytree.tree_flatten(output)
        roots = self.roots(timestep)
        channels = min(leaves[0].shape[1], sample.shape[1])
        key = (self.forward, 0)
        self.forward += 1
        if self.kept(0):
            noise = leaves[0].clone()
            if roots is not None:
                signal, spread = roots
                noise[:, :channels] *= signal
                noise[:, :channels] += spread * sample[:, :channels]
            self.last[key] = noise
            return output
        again = self.last[key].clone()
        if roots is not None:
            signal, spread = roots
            again[:, :channels] -= spread * sample[:, :channels]
            again[:, :channels] /= signal
        return pytree.tree_unflatten([again, *leaves[1:]], spec)

    def roots(self, timestep: Any) -> tuple[Any, Any] | None:
        if self.scheduler.config.get("prediction_type") != "v_prediction":
            return None
        if timestep == int(timestep):
            alpha = self.scheduler.alphas_cumprod[int(timestep)]
        else:  # Euler and Heun between two timesteps
            alpha = 1 / (1 + self.scheduler.sigmas[self.row] ** 2)
        return alpha**0.5, (1 - alpha) ** 0.5

    def stepped(self) -> None:
        self.row, self.forward = self.row + 1, 0


def _arguments(module: nn.Module, args: Any, kwargs: Any) -> tuple[Tensor, Any]:
    names = list(inspect.signature(module.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return given[names[0]], given["timestep"]


@contextmanager
def naive_run(
    pipe: Any, denoiser: nn.Module, graph: BlockGraph, rows: list[str], *, first: int = 0
) -> Iterator[None]:
    """Run the pipeline by a closed gate table, once. first: the row that the run starts with."""
    keep = np.array([[c == "1" for c in row] for row in rows])
    naive = _Naive(graph, keep, pipe.scheduler, first)
    handles = [
        denoiser.register_forward_pre_hook(naive.enter, with_kwargs=True),
        denoiser.register_forward_hook(naive.denoiser, with_kwargs=True),
    ]
    for index, block in enumerate(graph.blocks[1:], start=1):
        module = denoiser.get_submodule(block.name)
        handles.append(module.register_forward_hook(naive.block(index), with_kwargs=True))
    step = pipe.scheduler.step

    def stepping(*args: Any, **kwargs: Any) -> Any:
        naive.stepped()
        return step(*args, **kwargs)

    stepping.__signature__ = inspect.signature(step)  # type: ignore[attr-defined]
    pipe.scheduler.step = stepping
    try:
        yield
    finally:
        del pipe.scheduler.step
        for handle in handles:
            handle.remove()
