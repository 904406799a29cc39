"""Peak memory against an array of known size; energy against a counter of known ticks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dipgo_core.evaluation import footprint
from dipgo_core.evaluation.footprint import PeakMemory, energies_j, peak_memory
from dipgo_core.evaluation.stopwatch import Run

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
    """A GPU that draws more with every run: 3 J for a dense one at first, 1 J for a pruned one."""

    def __init__(self, warming: float = 0.0) -> None:
        self.begun: list[str] = []
        self.runs = 0
        self._drawn_mj = 1e6
        self._warming = warming

    @contextmanager
    def prepared(self, name: str, joules: float) -> Iterator[Run]:
        def run() -> None:
            self._drawn_mj += 1000 * joules * (1 + self._warming * self.runs)
            self.runs += 1

        self.begun.append(name)
        yield run

    def energy_mj(self) -> float:
        return self._drawn_mj

    def of_both(self, *, min_seconds: float) -> dict[str, float]:
        joules = {"dense": 3.0, "pruned": 1.0}
        runs = {name: partial(self.prepared, name, each) for name, each in joules.items()}
        gpu: Any = self
        return energies_j(runs, gpu, min_seconds=min_seconds)


def test_energy_is_the_mean_of_repeated_runs() -> None:
    meter = Meter()

    assert meter.of_both(min_seconds=0.01) == pytest.approx({"dense": 3, "pruned": 1})
    assert meter.runs > 4


def test_energy_of_a_gpu_that_gets_warmer_keeps_its_ratio() -> None:
    meter = Meter(warming=0.1)

    found = meter.of_both(min_seconds=0)  # one run at a time

    assert meter.begun == ["dense", "pruned", "pruned", "dense"]
    assert found["dense"] / found["pruned"] == pytest.approx(3)


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_run() -> None:
    import torch

    peak = peak_memory(lambda: torch.ones(_MIB, device="cuda"), "cuda")

    assert peak.allocated is not None
    assert peak.reserved is not None
    assert peak.reserved >= peak.allocated >= 4 * _MIB
