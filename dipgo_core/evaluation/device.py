"""The name of the device a latency belongs to, found without torch."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

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
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
    command += [f"--id={first}"] if first else []
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    names = answer.stdout.split("\n")
    return names[0].strip() or None
