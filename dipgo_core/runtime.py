"""apply_subnet: run a SubNet inside a stock diffusers pipeline, and take it out again.

Gates are armed inside a call of the pipeline they were applied to, and nowhere else: the call opens
a run in a context variable, and the hooks on denoiser and noise scheduler act for that run alone.
So pipelines, and threads, may share a denoiser.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from dipgo_core.binding import (
    check_blocks,
    check_model,
    check_offloading,
    check_scheduler,
    check_timesteps,
)
from dipgo_core.compiled import BlockCompiler, block_compiler, check_uncompiled
from dipgo_core.containers import container_hooks
from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.families import find_family
from dipgo_core.finite import watched_decode
from dipgo_core.gated import GatedCalls, GatePlan, Signature, outlined, signature_of
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.hooks import (
    Deciding,
    Forward,
    HookHandle,
    Interceptor,
    MethodHook,
    argument_reader,
    attach,
    directly,
    install,
    is_installed,
)
from dipgo_core.jumps import Jumps, jumps_for
from dipgo_core.pipelines import LoadedModel, graph_of
from dipgo_core.repeat import repeat_of
from dipgo_core.sampling import timesteps_of
from dipgo_core.structures import Structure, Tensors, flatten
from dipgo_core.subnet import SubNet

logger = logging.getLogger(__name__)

Current = Callable[[], GatedCalls | None]

_APPLIED = "_dipgo_subnet"  # attribute of a pipeline


@contextmanager
def gated_calls(model: LoadedModel, graph: BlockGraph, gates: GateTable) -> Iterator[GatedCalls]:
    """Run a model's denoiser by a gate table while the block lasts, whoever calls it.

    The caller says which call comes next, for example with
    ``rollout(..., on_call=policy.start_call)``.
    """
    policy = GatedCalls(GatePlan.of(graph, gates), lambda: repeat_of(model.pipe.scheduler))
    handle = install(model.denoiser, graph, policy)
    try:
        yield policy
    finally:
        handle.remove()


@dataclass(frozen=True, eq=False)
class _Run:
    """One call of the pipeline: who opened it, and everything it remembers."""

    handle: SubNetHandle
    gates: GatedCalls
    jumps: Jumps | None


_RUN: ContextVar[_Run | None] = ContextVar("dipgo_run", default=None)


class SubNetHandle:
    """The way back from `apply_subnet`; also a context manager.

    peak_cache_bytes: the most that the last finished run had cached at once, of all forwards of a
    step together.
    """

    def __init__(
        self, pipe: Any, subnet: SubNet, denoiser: nn.Module, attribute: str, graph: BlockGraph
    ) -> None:
        self.peak_cache_bytes = 0
        self._pipe = pipe
        self._subnet = subnet
        self._attribute = attribute
        self._denoiser = denoiser
        self._scheduler = pipe.scheduler
        self._plan = self._computed_plan = GatePlan.of(graph, subnet.gates)
        self._computed: list[int] | None = None  # set where skipped calls may be jumped over
        self._compiler: Interceptor = directly
        self._graph = graph
        self._hooks: HookHandle = attach(
            denoiser,
            graph,
            Deciding(self._current, self._compute_denoiser),
            Deciding(self._current_of_blocks, self._compute),
        )
        self._methods = [
            MethodHook(pipe.scheduler, "set_timesteps", self._on_set_timesteps),
            MethodHook(pipe.scheduler, "step", self._on_step),
        ]
        if self._plan.has_dead:
            self._methods += container_hooks(denoiser, graph, self._current_of_blocks)
        if isinstance(control := getattr(pipe, "controlnet", None), nn.Module):
            spared = _Spared(control.forward, self._current)
            self._methods.append(MethodHook(control, "forward", spared))
        self._watched: MethodHook | None = None
        self._watch_decoder()
        self._class = type(pipe)
        vars(pipe)[_APPLIED] = self
        object.__setattr__(pipe, "__class__", _armed(cast(Any, self._class)))

    @property
    def num_blocks(self) -> int:
        return self._hooks.num_blocks

    @contextmanager
    def run(self, jumps: Jumps | None = None) -> Iterator[None]:
        """Arm the gates while the block lasts: one sampling run, for loops of one's own.

        A call of the pipeline does this by itself. jumps: over the skipped calls, as it may make.

        Raises:
            SubNetError: the SubNet was removed from the pipeline.
            SubNetMismatchError: denoiser or noise scheduler were replaced after apply_subnet.
        """
        self._check_applied()
        self._check_parts()
        if isinstance(self._compiler, BlockCompiler):
            self._compiler.start_run()
        self._hooks.renew()
        self._methods = [hook.renewed() for hook in self._methods]
        self._watch_decoder()
        repeat = repeat_of(self._scheduler)
        gates = GatedCalls(
            self._plan,
            lambda: repeat,
            first_call=self._first_call,
            roomy=hasattr(self._pipe, "adapter"),  # T2I adapters add to what dead blocks return
        )
        token = _RUN.set(_Run(self, gates, jumps))
        try:
            yield
        finally:
            _RUN.reset(token)
            if jumps is not None:
                jumps.restore()
            self.peak_cache_bytes = gates.peak_cache_bytes

    def fuse(self) -> Self:
        """Make one step of the noise scheduler of each run of skipped calls, where that is equal.

        DDIM with equally spaced timesteps and no noise of its own, Euler, and Euler by flow
        matching; in pipelines that make images from prompts or labels alone, and in calls without
        callbacks. Anything else runs as before. Equal means: but for rounding.

        Raises:
            SubNetError: the SubNet was removed from the pipeline.
        """
        self._check_applied()
        family = find_family(self._subnet.model["family"])
        table = self._graph.close(self._subnet.gates)
        computed = table.keep[:, 0].nonzero()[0].tolist()
        stock = self._class.__name__ in family.pipelines[: family.searchable]
        straight = not table.extrapolation  # else a skipped call has a direction of its own
        if stock and straight and len(computed) < table.num_calls:
            self._computed = computed
            self._computed_plan = GatePlan.of(self._graph, GateTable(table.keep[computed]))
        return self

    def compile(self, **options: Any) -> Self:
        """Compute the blocks by compiled code from now on; gates stay in Python between them.

        What was compiled serves every row, and every SubNet that is applied to this denoiser.
        Another batch or resolution compiles once more, as it does without a SubNet (`dynamic`).
        options: of torch.compile.

        Raises:
            SubNetError: the options ask for CUDA graphs (the SubNet is removed then, for nobody may
                hold this handle yet), or the SubNet was removed before.
        """
        self._check_applied()
        try:
            self._compiler = block_compiler(self._denoiser, options)
        except SubNetError:
            self.remove()
            raise
        self._hooks.compiled = True
        return self

    def remove(self) -> None:
        """Restore pipeline, denoiser and noise scheduler exactly; a second call does nothing."""
        self._hooks.remove()
        for hook in (*self._methods, self._watched):
            if hook is not None:
                hook.remove()
        if vars(self._pipe).get(_APPLIED) is self:
            del vars(self._pipe)[_APPLIED]
            object.__setattr__(self._pipe, "__class__", self._class)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()

    def jumps_of(self, call: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the jumps that a call of the pipeline may make over its skipped calls, or None."""
        if self._computed is None:
            return None
        bound = inspect.signature(call).bind(self._pipe, *args, **kwargs)
        bound.apply_defaults()
        return jumps_for(self._scheduler, self._computed, {**bound.arguments, **kwargs})

    def _run(self) -> _Run | None:
        run = _RUN.get()
        return run if run is not None and run.handle is self else None

    def _current(self) -> GatedCalls | None:
        run = self._run()
        return None if run is None else run.gates

    def _current_of_blocks(self) -> GatedCalls | None:
        gates = self._current()
        idle = gates is not None and gates.leaves_blocks_alone and self._compiler is directly
        return None if idle else gates

    def _compute(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._compiler(original, args, kwargs)

    def _compute_denoiser(
        self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Compute a call: by one piece of compiled code if no gate has a part in it."""
        gates = self._current()
        alone = gates is not None and gates.leaves_blocks_alone and self._plan.seldom_mixed
        if alone and isinstance(self._compiler, BlockCompiler) and self._compiler.knows(original):
            return self._compiler(original, args, kwargs)
        return original(*args, **kwargs)

    def _check_applied(self) -> None:
        if vars(self._pipe).get(_APPLIED) is not self:
            raise SubNetError(
                "this handle's SubNet was removed from the pipeline; go on with a new handle: "
                "apply_subnet(pipe, subnet)"
            )

    def _watch_decoder(self) -> None:
        """Hook the autoencoder that the pipeline has by now."""
        vae, watched = getattr(self._pipe, "vae", None), self._watched
        if watched is not None and watched.owner is vae:
            self._watched = watched.renewed()
            return
        if watched is not None:
            watched.remove()
        self._watched = None
        if hasattr(vae, "decode"):
            watch = watched_decode(self._pipe, self._subnet, lambda: self._current() is not None)
            self._watched = MethodHook(vae, "decode", watch)

    def _check_parts(self) -> None:
        check_uncompiled(
            getattr(self._pipe, self._attribute), self._attribute, self._graph.names[1:]
        )
        for name, known in (("scheduler", self._scheduler), (self._attribute, self._denoiser)):
            if getattr(self._pipe, name) is not known:
                raise SubNetMismatchError(
                    f"pipe.{name} was replaced after apply_subnet, so the gates cannot follow it; "
                    "call remove() on the handle, then apply_subnet(pipe, subnet) again"
                )
        check_offloading(self._denoiser, self._attribute)

    def _on_set_timesteps(
        self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        result = original(*args, **kwargs)
        if (run := self._run()) is not None:
            check_timesteps(self._scheduler, self._subnet)
            shortened = run.jumps is not None and run.jumps.shorten()
            run.gates.restart(self._computed_plan if shortened else self._plan)
        return result

    def _on_step(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run()
        if run is None:
            return original(*args, **kwargs)
        jumps = run.jumps
        result = original(*args, **kwargs) if jumps is None else jumps.step(original, args, kwargs)
        run.gates.advance()
        return result

    def _first_call(self, timestep: Any) -> int:
        """Return the row that a run starts with (image-to-image starts late)."""
        begin = getattr(self._scheduler, "begin_index", None)
        if begin is not None:
            return int(begin)
        now = float(timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep)
        timesteps = timesteps_of(self._scheduler)
        rows = [row for row, known in enumerate(timesteps) if known == now]  # PNDM has one twice
        told = len(timesteps) - getattr(self._pipe, "num_timesteps", 0)
        return told if told in rows else next(iter(rows), 0)


def apply_subnet(pipe: Any, subnet: SubNet) -> SubNetHandle:
    """Make calls of `pipe` compute only what `subnet` keeps, until the handle is removed.

    Gates follow the noise scheduler's steps and start anew with every call. Other pipelines that
    share the denoiser stay as they are.

    Raises:
        SubNetError: a SubNet is applied to this pipeline already.
        SubNetMismatchError: denoiser or noise scheduler are not the SubNet's; also raised by the
            pipeline call when its timesteps are not the SubNet's. The call raises SubNetError, too,
            where it would decode latents that are not finite, or make images that are not.
    """
    attribute = find_family(subnet.model["family"]).denoiser_attribute
    denoiser = getattr(pipe, attribute, None)
    check_uncompiled(denoiser, attribute, subnet.block_names[1:])
    check_model(pipe, denoiser, subnet)
    check_scheduler(pipe.scheduler, subnet)
    denoiser = cast(nn.Module, denoiser)
    check_offloading(denoiser, attribute)
    if _APPLIED in vars(pipe) or is_installed(denoiser):
        raise SubNetError(
            "this pipeline has a SubNet applied already; call remove() on its handle first"
        )
    graph = _graph_of(pipe, denoiser, subnet)
    handle = SubNetHandle(pipe, subnet, denoiser, attribute, graph)
    logger.info(
        "SubNet applied: hooked %d blocks of %s for %d calls",
        handle.num_blocks,
        graph.denoiser,
        subnet.gates.num_calls,
    )
    return handle


def _graph_of(pipe: Any, denoiser: nn.Module, subnet: SubNet) -> BlockGraph:
    family = find_family(subnet.model["family"])
    graph = graph_of(pipe, family, subnet.granularity)
    check_blocks(graph, subnet)
    return graph


@functools.cache
def _armed(cls: type) -> type:
    """Return a class of the same name whose calls are runs of the SubNet applied to the object."""
    call = cast(Any, cls).__call__

    @functools.wraps(call)
    def gated_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        handle = vars(self).get(_APPLIED)
        if handle is None:  # another object of this class: `type(pipe)(**pipe.components)`
            return call(self, *args, **kwargs)
        with handle.run(handle.jumps_of(call, args, kwargs)):
            return call(self, *args, **kwargs)

    def reduced(self: Any, protocol: object) -> tuple[Any, ...]:
        """Make copies plain: the gates are this object's alone."""
        state = {name: value for name, value in vars(self).items() if name != _APPLIED}
        return object.__new__, (cls,), state

    members = {"__call__": gated_call, "__module__": cls.__module__, "__doc__": cls.__doc__}
    members["__reduce_ex__"] = reduced
    return type(cls.__name__, (cls,), {**members, "__qualname__": cls.__qualname__})


class _Spared:
    """Interceptor of a ControlNet: it is not computed for calls that skip the denoiser."""

    def __init__(self, forward: Forward, current: Current) -> None:
        self._current = current
        self._sample_of = argument_reader(forward)
        self._last: WeakKeyDictionary[GatedCalls, tuple[Signature, Tensors, Structure]]
        self._last = WeakKeyDictionary()  # by run

    def __call__(self, original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        gates = self._current()
        if gates is None:
            return original(*args, **kwargs)
        signature = signature_of(self._sample_of(args, kwargs))
        last = self._last.get(gates)
        if last and last[0] == signature and gates.spares():
            return last[2].rebuild(last[1])
        output = original(*args, **kwargs)
        tensors, structure = flatten(output)
        self._last[gates] = (signature, outlined(tensors), structure)
        return output
