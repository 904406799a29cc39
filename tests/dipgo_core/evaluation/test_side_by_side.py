"""Two kinds of runs measured in turn: what is watched, when clocks are read, what is repeated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dipgo_core.errors import DeviceError
from dipgo_core.evaluation import side_by_side
from dipgo_core.evaluation.latency import Latency, WarmUp, measure_latency
from dipgo_core.evaluation.load import QUIET, CpuWatch, Finding, GpuWatch, undisturbed
from dipgo_core.evaluation.nvml import Gpu
from dipgo_core.evaluation.side_by_side import (
    Effort,
    PreparedRun,
    energy_an_image,
    measure_side_by_side,
    watches_of,
)
from dipgo_core.evaluation.stopwatch import Timed

ONE = Timed(1.0)


def energies_of(runs: Mapping[str, Any], gpu: Gpu) -> dict[str, float]:
    """A meter of 8 J a dense run and 4 J a pruned one."""
    if gpu.handle == "silent":
        raise DeviceError("the GPU does not tell its energy: Not Supported")
    return {"dense": 8.0, "pruned": 4.0}


def test_energy_is_per_image_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "energies_j", energies_of)
    assert energy_an_image({}, Gpu("counting"), 4) == {"dense_j": 2, "pruned_j": 1}
    assert "Not Supported" in energy_an_image({}, Gpu("silent"), 4)["unread"]
    assert energy_an_image({}, "no driver", 4) == {"unread": "no driver"}


class Steps:
    """What a measurement does, in order, on a quiet machine whose warm-ups are as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *warmups: WarmUp) -> None:
        self.done: list[str] = []
        once = measure_latency(int, int, warmup=0, min_runs=2, min_seconds=0, timer=lambda run: ONE)
        self._found = (replace(once, warmup=warmup) for warmup in warmups)
        fakes = {
            "_wake": lambda device: self.done.append("wake"),
            "_clock": lambda device, gpu: self.done.append("clock"),
            "_footprint": self.footprint,
            "measure_latency": self.measure_latency,
            "watches_of": lambda *args: [self],
            "undisturbed": partial(undisturbed, pause_seconds=0),
            "_timer": lambda model: None,
            **dict.fromkeys(("attention_in_use", "compile_mode"), lambda denoiser: "default"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(side_by_side, name, fake)

    def idle(self) -> Finding:
        self.done.append("idle")
        return QUIET

    def start(self) -> None:
        self.done.append("start")

    def stop(self) -> Finding:
        self.done.append("stop")
        return QUIET

    def footprint(self, *args: Any) -> dict[str, Any]:
        self.done.append("footprint")
        return {"memory": {}, "energy": {}}

    def measure_latency(self, *args: Any, warmed: Callable[[], object], **settings: Any) -> Latency:
        self.done.append("warm up")
        warmed()
        self.done.append("time")
        return next(self._found)

    def outputs(self) -> dict[str, Any]:
        model: Any = SimpleNamespace(
            denoiser=None,
            device=torch.device("cpu"),
            settings=SimpleNamespace(dtype="float32"),
        )
        nothing = PreparedRun(lambda: nullcontext(int))
        return measure_side_by_side(model, nothing, nothing, Effort(tries=2), parent=1)


def test_everything_measured_is_watched_and_the_clock_is_a_warm_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps = Steps(monkeypatch, WarmUp(pairs=7, stable=True))
    steps.outputs()
    assert steps.done == [
        *("wake", "idle", "start"),
        *("warm up", "clock", "time", "clock", "footprint"),
        *("stop", "idle"),
    ]


def test_what_had_not_settled_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    restless = WarmUp(pairs=20, stable=False)
    outputs = Steps(monkeypatch, restless, WarmUp(pairs=7, stable=True)).outputs()
    assert (outputs["warmup"]["pairs"], outputs["tries"]) == (7, 2)
    outputs = Steps(monkeypatch, restless, restless).outputs()
    assert (outputs["warmup"]["stable"], outputs["usable"]) == (False, True)


def test_warm_up_too_short_to_be_judged_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Steps(monkeypatch, WarmUp(pairs=3, stable=False)).outputs()["tries"] == 1


def test_gpu_is_watched_beside_the_processor() -> None:
    processor, gpu = watches_of("cuda", Gpu("quiet"), 1)
    assert (processor, type(gpu)) == (CpuWatch(threads=torch.get_num_threads()), GpuWatch)


def test_gpu_that_cannot_be_watched_is_said_to_be_unchecked() -> None:
    _, unwatched = watches_of("cuda", "no driver", 1)
    assert unwatched.idle() == unwatched.stop()
    assert unwatched.stop().unchecked == ("load and processes of the GPU: no driver",)
    assert len(watches_of("cpu", "no GPU is used", 1)) == 1
