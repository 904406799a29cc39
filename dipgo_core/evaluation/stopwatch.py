"""Timing one run: end to end, and inside a pipeline call its denoising loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from dipgo_core.hooks import Forward, MethodHook

Run = Callable[[], object]


@dataclass(frozen=True)
class Timed:
    """How long one run took, in milliseconds; loop_ms: its denoising loop, None if not timed."""

    total_ms: float
    loop_ms: float | None = None


#: Runs once and says how long it took.
Timer = Callable[[Run], Timed]


class Stopwatch(Protocol):
    """Marks moments of a device's work."""

    def mark(self) -> Any:
        """Return this moment, in the order of the work that was given to the device."""

    def wait(self) -> None:
        """Wait until the device has done everything it was given."""

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks, after `wait`."""


class WallStopwatch:
    """The wall clock, for devices that work while they are asked."""

    def mark(self) -> float:
        return time.perf_counter()

    def wait(self) -> None:
        """Nothing is pending."""

    def milliseconds(self, start: float, end: float) -> float:
        return (end - start) * 1000


class CudaStopwatch:
    """CUDA events on the current stream: marks cost the host no waiting."""

    def mark(self) -> Any:
        new_event: Callable[..., Any] = torch.cuda.Event
        event = new_event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        torch.cuda.synchronize()

    def milliseconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))


def stopwatch_for(device: str | torch.device) -> Stopwatch:
    """Return CUDA events for a GPU, the wall clock for everything else."""
    return CudaStopwatch() if torch.device(device).type == "cuda" else WallStopwatch()


def timed(run: Run, watch: Stopwatch) -> Timed:
    """Time one run from an idle device to an idle device."""
    watch.wait()
    start = watch.mark()
    run()
    end = watch.mark()
    watch.wait()
    return Timed(watch.milliseconds(start, end))


def timed_call(call: Run, scheduler: Any, denoiser: nn.Module, watch: Stopwatch) -> Timed:
    """Time a pipeline call and in it the denoising loop.

    The loop lasts from entering the denoiser for the first time to the end of the last step of the
    noise scheduler; encoding prompts and decoding images lie outside.
    """
    with _loop_marks(scheduler, denoiser, watch) as marks:
        whole = timed(call, watch)
    loop_ms = watch.milliseconds(marks[0], marks[-1]) if len(marks) > 1 else None
    return Timed(whole.total_ms, loop_ms)


def _entry(denoiser: nn.Module) -> str:
    """Return the method that calls of a module enter by: compiled code is not looked into."""
    compiled = getattr(denoiser, "_compiled_call_impl", None) is not None
    return "_compiled_call_impl" if compiled else "forward"


@contextmanager
def _loop_marks(scheduler: Any, denoiser: nn.Module, watch: Stopwatch) -> Iterator[list[Any]]:
    """Collect the beginning of the loop, then the end of its last step so far."""
    marks: list[Any] = []

    def on_forward(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not marks:
            marks.append(watch.mark())
        return original(*args, **kwargs)

    def on_step(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = original(*args, **kwargs)
        marks[1:] = [watch.mark()]
        return result

    hooks = [
        MethodHook(denoiser, _entry(denoiser), on_forward),
        MethodHook(scheduler, "step", on_step),
    ]
    try:
        yield marks
    finally:
        for hook in reversed(hooks):
            hook.remove()
