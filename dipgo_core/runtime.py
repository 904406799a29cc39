"""apply_subnet: run a SubNet inside a stock diffusers pipeline, and take it out again."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from dipgo_core.blocks import trace_denoiser
from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.families import find_family
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph, Reuse
from dipgo_core.hooks import Forward, HookHandle, MethodHook, Tensors, install, is_hooked
from dipgo_core.pipelines import deciding_config, timesteps_of, tokens_of
from dipgo_core.subnet import SubNet

logger = logging.getLogger(__name__)


@dataclass
class _Caches:
    """What one position of the step last computed, and for which kind of sample."""

    signature: tuple[Any, ...]
    prediction: Tensors | None = None
    blocks: dict[int, Tensors] = field(default_factory=dict)


class GatedCalls:
    """Policy that follows a gate table: computes live blocks, reuses caches for all others.

    `start_call` tells it where the run is. A pipeline that evaluates the denoiser several times a
    call has one set of caches for each position. A sample of another shape, dtype or device than
    the cached one is computed whole. Only what a later call reads is cached.
    """

    def __init__(self, graph: BlockGraph, gates: GateTable) -> None:
        self._live = graph.close(gates).keep  # (T, N)
        self._reuse = tuple(block.reuse for block in graph.blocks)
        self._read_later = _read_later(self._live)  # (T, N)
        self._caches: dict[int, _Caches] = {}
        self.start_call(0)

    def start_call(self, call: int) -> None:
        """Go to row `call` of the table; call 0 begins a run and forgets everything cached."""
        if call == 0:
            self._caches.clear()
        self._call = call
        self._position = 0
        self._whole = False

    def denoiser(self, sample: Tensor, compute: Callable[[], Tensors]) -> Tensors:
        if self._call >= len(self._live):
            raise SubNetMismatchError(
                f"the SubNet has {len(self._live)} calls, but the denoiser is called once more"
            )
        self._current = caches = self._enter(sample)
        if not self._computes(0):
            assert caches.prediction is not None
            return _cloned(caches.prediction)
        prediction = compute()
        keep = self._read_later[self._call, 0]
        caches.prediction = _cloned(prediction) if keep else None
        return prediction

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        blocks = self._current.blocks
        residual = self._reuse[index] is Reuse.RESIDUAL
        if not self._computes(index):
            cached = blocks[index]
            return _added(streams, cached) if residual else _cloned(cached)
        outputs = compute()
        if self._read_later[self._call, index]:
            blocks[index] = _subtracted(outputs, streams) if residual else _cloned(outputs)
        else:
            blocks.pop(index, None)
        return outputs

    def _computes(self, index: int) -> bool:
        return self._whole or bool(self._live[self._call, index])

    def _enter(self, sample: Tensor) -> _Caches:
        """Return the caches of this position, fresh ones if they do not fit the sample."""
        signature = (sample.shape, sample.dtype, sample.device)
        caches = self._caches.get(self._position)
        if caches is None or caches.signature != signature:
            caches = self._caches[self._position] = _Caches(signature)
        self._position += 1
        self._whole = self._whole or not self._suffices(caches)
        return caches

    def _suffices(self, caches: _Caches) -> bool:
        row = self._live[self._call]
        if not row[0]:
            return caches.prediction is not None
        return all(n in caches.blocks for n in np.flatnonzero(~row).tolist())


def _read_later(live: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which outputs of each call a later call reuses before they are computed again.  # (T, N)"""
    read = np.zeros_like(live)
    reused_next = np.zeros(live.shape[1], dtype=np.bool_)  # by the next call that is not skipped
    for call in range(len(live) - 2, -1, -1):
        following = live[call + 1]
        if following[0]:
            reused_next = ~following
        read[call] = reused_next
        read[call, 0] = not following[0]
    return read


def _cloned(tensors: Tensors) -> Tensors:
    """Copies, because some modules (FreeU, adapters) change what they are given in place."""
    return tuple(None if t is None else t.clone() for t in tensors)


def _subtracted(outputs: Tensors, streams: Tensors) -> Tensors:
    return tuple(
        None if out is None or stream is None else out - stream
        for out, stream in zip(outputs, streams, strict=True)
    )


def _added(streams: Tensors, changes: Tensors) -> Tensors:
    return tuple(
        None if change is None or stream is None else stream + change
        for stream, change in zip(streams, changes, strict=True)
    )


@contextmanager
def gated_calls(denoiser: nn.Module, graph: BlockGraph, gates: GateTable) -> Iterator[GatedCalls]:
    """Run a denoiser by a gate table while the block lasts.

    The caller says which call comes next, for example with
    ``rollout(..., on_call=lambda call, _: policy.start_call(call))``.
    """
    policy = GatedCalls(graph, gates)
    handle = install(denoiser, graph, policy)
    try:
        yield policy
    finally:
        handle.remove()


class SubNetHandle:
    """The way back from `apply_subnet`; also a context manager."""

    def __init__(self, hooks: HookHandle, clock: list[MethodHook]) -> None:
        self._hooks = hooks
        self._clock = clock

    @property
    def num_blocks(self) -> int:
        return self._hooks.num_blocks

    def remove(self) -> None:
        """Restore denoiser and noise scheduler exactly; a second call does nothing."""
        self._hooks.remove()
        for hook in self._clock:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def apply_subnet(pipe: Any, subnet: SubNet) -> SubNetHandle:
    """Make `pipe` compute only what `subnet` keeps, until the handle is removed.

    Gates advance with the noise scheduler's steps and restart with every sampling run.

    Raises:
        SubNetError: a SubNet is applied to this pipeline already.
        SubNetMismatchError: denoiser or noise scheduler are not the SubNet's; also raised by the
            pipeline call when its timesteps are not the SubNet's.
    """
    family = find_family(subnet.model["family"])
    denoiser = getattr(pipe, family.denoiser_attribute, None)
    _check_model(pipe, denoiser, subnet)
    _check_scheduler(pipe.scheduler, subnet)
    denoiser = cast(nn.Module, denoiser)
    if is_hooked(denoiser):
        raise SubNetError(
            "this pipeline has a SubNet applied already; call remove() on its handle first"
        )
    graph = trace_denoiser(denoiser, family, tokens=tokens_of(pipe), granularity=subnet.granularity)
    _check_blocks(graph, subnet)
    policy = GatedCalls(graph, subnet.gates)
    hooks = install(denoiser, graph, _Guarded(pipe, pipe.scheduler, policy))
    logger.info(
        "SubNet applied: hooked %d blocks of %s for %d calls",
        hooks.num_blocks,
        graph.denoiser,
        subnet.gates.num_calls,
    )
    return SubNetHandle(hooks, _clock(pipe.scheduler, subnet, policy))


@dataclass(frozen=True)
class _Guarded:
    """The gates of a pipeline whose noise scheduler must stay the one they listen to."""

    pipe: Any
    scheduler: Any
    gates: GatedCalls

    def denoiser(self, sample: Tensor, compute: Callable[[], Tensors]) -> Tensors:
        if self.pipe.scheduler is not self.scheduler:
            raise SubNetMismatchError(
                "pipe.scheduler was replaced after apply_subnet, so the gates cannot follow its "
                "steps; call remove() on the handle, then apply_subnet(pipe, subnet) again"
            )
        return self.gates.denoiser(sample, compute)

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        return self.gates.block(index, streams, compute)


def _clock(scheduler: Any, subnet: SubNet, gates: GatedCalls) -> list[MethodHook]:
    """Let the gates follow the noise scheduler's steps."""
    calls = 0

    def on_set_timesteps(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal calls
        result = original(*args, **kwargs)
        _check_timesteps(scheduler, subnet)
        calls = 0
        gates.start_call(0)
        return result

    def on_step(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        nonlocal calls
        result = original(*args, **kwargs)
        calls += 1
        gates.start_call(calls)
        return result

    return [
        MethodHook(scheduler, "set_timesteps", on_set_timesteps),
        MethodHook(scheduler, "step", on_step),
    ]


def _check_model(pipe: Any, denoiser: Any, subnet: SubNet) -> None:
    expected = subnet.model["denoiser"]
    if type(denoiser).__name__ != expected:
        found = "none" if denoiser is None else type(denoiser).__name__
        raise SubNetMismatchError(
            f"the SubNet was made for {expected} of {subnet.model['id']}, but this "
            f"{type(pipe).__name__} has {found}; load {subnet.model['id']!r}"
        )
    differing = _differences(subnet.model["config"], denoiser)
    if differing:
        raise SubNetMismatchError(
            f"the SubNet was made for {subnet.model['id']}, whose {expected} has another config "
            f"(SubNet / this pipeline): {differing}; load {subnet.model['id']!r}"
        )


def _check_scheduler(scheduler: Any, subnet: SubNet) -> None:
    expected, found = subnet.sampler["scheduler"], type(scheduler).__name__
    differing = _differences(subnet.sampler["config"], scheduler)
    if expected == found and not differing:
        return
    what = f"config differs (SubNet / this pipeline): {differing}" if expected == found else found
    raise SubNetMismatchError(
        f"the SubNet was made for the noise scheduler {expected}, this pipeline's {what}. "
        f"This works: pipe.scheduler = diffusers.{expected}.from_config("
        'subnet.sampler["config"])'
    )


def _differences(expected: Mapping[str, Any], configured: Any) -> str:
    """Return "field: theirs / ours" for every field that differs; absent fields have defaults."""
    parameters = inspect.signature(type(configured).__init__).parameters
    found = deciding_config(configured)

    def value(config: Mapping[str, Any], name: str) -> Any:
        default = parameters[name].default if name in parameters else "absent"
        given = config.get(name, default)
        return list(given) if isinstance(given, tuple) else given

    pairs = {name: (value(expected, name), value(found, name)) for name in {*expected, *found}}
    return ", ".join(f"{n}: {a!r} / {b!r}" for n, (a, b) in sorted(pairs.items()) if a != b)


def _check_timesteps(scheduler: Any, subnet: SubNet) -> None:
    found, expected = timesteps_of(scheduler), list(subnet.sampler["timesteps"])
    if found != expected:
        arguments = ", ".join(f"{name}={value}" for name, value in subnet.call_kwargs().items())
        raise SubNetMismatchError(
            f"the SubNet has {len(expected)} calls at timesteps {_shortened(expected)}, this run "
            f"has {len(found)} at {_shortened(found)}. This works: "
            f"pipe(..., **subnet.call_kwargs()), that is pipe(..., {arguments})"
        )


def _shortened(timesteps: list[float]) -> str:
    shown = [f"{t:g}" for t in timesteps]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "...", shown[-1]])


def _check_blocks(graph: BlockGraph, subnet: SubNet) -> None:
    expected = list(zip(subnet.block_names, subnet.reuse, strict=True))
    found = [(block.name, block.reuse) for block in graph.blocks]
    if expected != found:
        missing = sorted({name for name, _ in expected} - set(graph.names))
        extra = sorted(set(graph.names) - {name for name, _ in expected})
        raise SubNetMismatchError(
            f"the SubNet's blocks are not those of this {graph.denoiser}: missing here "
            f"{missing or 'none'}, not in the SubNet {extra or 'none'}, or in another order or "
            "kind of reuse; export the SubNet again with this version"
        )
