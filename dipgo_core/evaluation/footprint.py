"""What a run takes besides time: peak memory, and energy where the GPU tells it."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from dipgo_core.evaluation.nvml import Gpu
from dipgo_core.evaluation.stopwatch import Run

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)

#: Sets a kind of run up, and gives the run, which may be repeated.
Prepared = Callable[[], AbstractContextManager[Run]]


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Most memory held at once during one run, in bytes; None where it is not told.

    allocated, reserved: on the GPU, by tensors and by PyTorch's allocator. resident: of the whole
    process in host memory, weights and libraries included.
    """

    allocated: int | None = None
    reserved: int | None = None
    resident: int | None = None


def peak_memory(run: Run, device: str | torch.device) -> PeakMemory:
    """Run once and return the peak, counted from what the process holds before it."""
    gc.collect()
    if torch.device(device).type != "cuda":
        return PeakMemory(resident=_peak_resident(run))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return PeakMemory(
        allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved()
    )


def _peak_resident(run: Run) -> int | None:
    """Return the process's peak resident set during a run; None where Linux does not reset it."""
    if not reset_resident_peak():
        return None
    run()
    return resident_peak()


def reset_resident_peak() -> bool:
    """Let the process's peak resident set count from now on; False where Linux does not do so."""
    _return_free_memory()
    try:
        _CLEAR.write_text(_RESET_PEAK, encoding="ascii")
    except OSError:
        return False
    return True


def resident_peak() -> int | None:
    """Return the process's peak resident set in bytes."""
    for line in _STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _return_free_memory() -> None:
    """Give freed memory back to the system, or an earlier run's peak counts as this one's."""
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)


def energies_j(
    runs: Mapping[str, Prepared], gpu: Gpu, *, min_seconds: float = 1.0
) -> dict[str, float]:
    """Return the energy one run of each kind takes on the whole GPU, in joules.

    The driver's counter ticks some ten times a second: only a sum over seconds means anything, so a
    run is repeated without a pause for `min_seconds`. The kinds come in turn and then in reverse,
    so that a GPU that gets warmer draws as much more for one as for another.

    Raises:
        DeviceError: the GPU does not count its energy.
    """
    joules, counts = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
    for name in (*runs, *reversed([*runs])):
        with runs[name]() as run:
            drawn, count = _drawn(run, gpu, min_seconds)
        joules[name] += drawn
        counts[name] += count
    return {name: joules[name] / counts[name] for name in runs}


def _drawn(run: Run, gpu: Gpu, min_seconds: float) -> tuple[float, int]:
    """Return the joules of repeated runs, and how many there were."""
    _wait()
    before, began, count = gpu.energy_mj(), time.monotonic(), 0
    while count == 0 or time.monotonic() - began < min_seconds:
        run()
        count += 1
    _wait()
    return (gpu.energy_mj() - before) / 1000, count


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
