"""Name and clock of the device a latency belongs to, found without torch."""

from __future__ import annotations

import platform
from pathlib import Path

from dipgo_core.errors import DeviceError
from dipgo_core.evaluation.nvml import Gpu, open_gpu

_CPUINFO = Path("/proc/cpuinfo")


def device_name(kind: str = "cpu") -> str:
    """Return the name of the device that latencies on this host are keyed on.

    kind: "cpu", or "cuda" for the first GPU the driver lists; an unknown kind is its own name.
    """
    if kind == "cpu":
        return cpu_name()
    if kind.startswith("cuda"):
        return gpu_name() or kind
    return kind


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the processor's model name, or what the platform calls it."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        field, _, value = line.partition(":")
        if field.strip() == "model name" and value.strip():
            return " ".join(value.split())
    return platform.processor() or platform.machine() or "unknown processor"


def gpu_name() -> str | None:
    """Return the first visible GPU's name as its driver tells it, or None without a driver."""
    try:
        return open_gpu().name()
    except DeviceError:
        return None


def gpu_memory_bytes() -> int | None:
    """Return the memory of the first visible GPU, or None without a driver that tells."""
    try:
        return open_gpu().memory_bytes()
    except DeviceError:
        return None


def cpu_mhz(cpuinfo: Path = _CPUINFO) -> float | None:
    """Return the mean clock of all processors at this moment, None where it is not told."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    clocks = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return sum(clocks) / len(clocks) if clocks else None


def clock_mhz(kind: str, gpu: Gpu | None) -> float | None:
    """Return the clock of the GPU's multiprocessors, or of the processors for kind "cpu"."""
    if kind == "cpu":
        return cpu_mhz()
    try:
        return None if gpu is None else gpu.sm_clock_mhz()
    except DeviceError:
        return None
