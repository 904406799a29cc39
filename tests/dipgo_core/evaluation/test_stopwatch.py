"""Spans of a pipeline call, by a clock that only moves when a part of the pipeline is run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dipgo_core.evaluation import stopwatch
from dipgo_core.evaluation.execution import attention_in_use, compile_mode, library_versions
from dipgo_core.evaluation.stopwatch import CudaStopwatch, WallStopwatch, timed, timed_call
from tests.support.tiny import tiny_dit, tiny_sd


class Ticks:
    """A clock in milliseconds that stands still unless `pass_` moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_(self, milliseconds: float) -> None:
        self.now += milliseconds

    def mark(self) -> float:
        return self.now

    def wait(self) -> None: ...

    def milliseconds(self, start: float, end: float) -> float:
        return end - start


class Denoiser(nn.Module):
    def __init__(self, ticks: Ticks) -> None:
        super().__init__()
        self.ticks = ticks

    def forward(self) -> None:
        self.ticks.pass_(10)


def test_loop_is_from_the_first_denoiser_call_to_the_last_step() -> None:
    ticks = Ticks()
    denoiser = Denoiser(ticks)
    scheduler = SimpleNamespace(step=lambda: ticks.pass_(1))

    def call() -> None:
        ticks.pass_(100)  # prompts
        for _ in range(3):
            denoiser()
            scheduler.step()
        ticks.pass_(200)  # images

    found = timed_call(call, scheduler, denoiser, ticks)

    assert (found.total_ms, found.loop_ms) == (333, 33)
    assert "forward" not in vars(denoiser)


def test_call_without_a_denoiser_has_no_loop() -> None:
    found = timed_call(lambda: None, SimpleNamespace(step=lambda: None), Denoiser(Ticks()), Ticks())

    assert found.loop_ms is None


def test_loop_of_a_real_pipeline_lies_inside_the_call() -> None:
    pipe = tiny_sd()
    call = lambda: pipe("a red cat", num_inference_steps=3, output_type="np")  # noqa: E731

    found = timed_call(call, pipe.scheduler, pipe.unet, WallStopwatch())

    assert found.loop_ms is not None
    assert 0 < found.loop_ms < found.total_ms


def test_loop_of_a_compiled_denoiser_has_its_first_call_too() -> None:
    """Oracle: the same, not compiled; timing it again compiles nothing anew."""
    ticks, found = Ticks(), []
    denoiser = nn.Linear(2, 2)
    scheduler = SimpleNamespace(step=lambda: ticks.pass_(1))

    def call() -> None:
        for _ in range(3):
            denoiser(torch.zeros(1, 2))
            ticks.pass_(10)
            scheduler.step()

    for compiled in (False, True):
        if compiled:
            denoiser.compile(backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            found += [timed_call(call, scheduler, denoiser, ticks).loop_ms for _ in range(2)]
    assert found == [33.0] * 4


class FakeEvent:
    """A CUDA event of a device that is ahead by a millisecond at every record."""

    clock = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.clock += 1
        self.at = FakeEvent.clock

    def elapsed_time(self, end: Any) -> float:
        return float(end.at - self.at)


def test_cuda_events_are_read_after_the_device_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    fake = SimpleNamespace(Event=FakeEvent, synchronize=lambda: log.append("wait"))
    monkeypatch.setattr(stopwatch.torch, "cuda", fake)

    found = timed(lambda: log.append("run"), CudaStopwatch())

    assert log == ["wait", "run", "wait"]
    assert found.total_ms == 1


def test_attention_in_use_names_processors_and_backends() -> None:
    assert attention_in_use(tiny_sd().unet).startswith("AttnProcessor2_0 (native; sdpa: ")
    assert "math" in attention_in_use(tiny_dit().transformer)
    assert attention_in_use(nn.Linear(1, 1)).startswith("none (")


def test_compile_mode_is_found_in_any_part() -> None:
    whole = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    assert compile_mode(whole) == "none"
    whole[1].compile()
    assert compile_mode(whole) == "torch.compile"


def test_library_versions_are_those_that_compute() -> None:
    assert library_versions()["torch"].split("+")[0] == torch.__version__.split("+")[0]
