"""Peak memory against an array of known size; energy against a counter of known ticks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dipgo_core.evaluation import footprint
from dipgo_core.evaluation.footprint import PeakMemory, energy_j, peak_memory

_MIB = 2**20


def test_peak_resident_memory_is_that_of_this_run_alone() -> None:
    def take(mib: int) -> None:
        np.ones(mib * _MIB // 8)

    take(300)
    small, large = (peak_memory(lambda size=size: take(size), "cpu") for size in (20, 220))
    if small.resident is None or large.resident is None:
        pytest.skip("this system does not reset peaks")
    assert large.resident - small.resident == pytest.approx(200 * _MIB, rel=0.2)


def test_peak_that_cannot_be_reset_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "_CLEAR", Path("/nonexistent/clear_refs"))

    assert peak_memory(lambda: None, "cpu") == PeakMemory()


class Meter:
    """A GPU that has drawn 3 J whenever a run has ended."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self) -> None:
        self.runs += 1

    def energy_mj(self) -> float:
        return 1e6 + 3000 * self.runs


def test_energy_is_the_mean_of_repeated_runs() -> None:
    meter = Meter()

    assert energy_j(meter.run, meter, min_seconds=0.01) == pytest.approx(3)  # type: ignore[arg-type]
    assert meter.runs > 1


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_run() -> None:
    import torch

    peak = peak_memory(lambda: torch.ones(_MIB, device="cuda"), "cuda")

    assert peak.allocated is not None
    assert peak.reserved is not None
    assert peak.reserved >= peak.allocated >= 4 * _MIB
