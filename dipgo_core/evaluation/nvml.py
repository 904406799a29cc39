"""What the NVIDIA driver tells of a GPU (NVML): the only import of pynvml. No torch."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import pynvml

from dipgo_core.errors import DeviceError

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """One GPU, asked through its driver.

    Every method raises DeviceError where driver or device do not tell (MIG slices, containers).
    """

    handle: Any

    def name(self) -> str:
        return _text(_asked("the name", lambda: pynvml.nvmlDeviceGetName(self.handle)))

    def memory_bytes(self) -> int:
        """Return how much memory the GPU has."""
        read = pynvml.nvmlDeviceGetMemoryInfo
        return int(_asked("its memory", lambda: read(self.handle)).total)

    def sm_clock_mhz(self) -> float:
        """Return the clock of the multiprocessors at this moment."""
        kind = pynvml.NVML_CLOCK_SM
        return float(
            _asked("the SM clock", lambda: pynvml.nvmlDeviceGetClockInfo(self.handle, kind))
        )

    def busy_percent(self) -> float:
        """Return the share of the last sample period (up to 1 s) in which any kernel ran."""
        rates = _asked("the load", lambda: pynvml.nvmlDeviceGetUtilizationRates(self.handle))
        return float(rates.gpu)

    def compute_pids(self) -> frozenset[int]:
        """Return the ids of all processes that have a compute context."""
        read = pynvml.nvmlDeviceGetComputeRunningProcesses
        return frozenset(p.pid for p in _asked("its processes", lambda: read(self.handle)))

    def energy_mj(self) -> float:
        """Return the energy drawn since the driver was loaded, in millijoules."""
        read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        return float(_asked("its energy", lambda: read(self.handle)))


def open_gpu(uuid: str | None = None) -> Gpu:
    """Return the GPU with this id, else the first one CUDA_VISIBLE_DEVICES names, else the first.

    Raises:
        DeviceError: there is no driver, or no such GPU.
    """
    _asked("its driver", pynvml.nvmlInit)
    visible = uuid or os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip() or "0"
    if visible.isdigit():
        return Gpu(
            _asked(f"GPU {visible}", lambda: pynvml.nvmlDeviceGetHandleByIndex(int(visible)))
        )
    return Gpu(_asked(f"GPU {visible}", lambda: pynvml.nvmlDeviceGetHandleByUUID(visible)))


def _asked(what: str, ask: Callable[[], T]) -> T:
    try:
        return ask()
    except pynvml.NVMLError as error:
        raise DeviceError(f"the GPU does not tell {what}: {error}") from error


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
