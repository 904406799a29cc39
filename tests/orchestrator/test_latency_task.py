"""The worker's side of a latency task: the device is the planned one, and the GPU is free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dipgo_core.errors import DeviceError, TaskError
from dipgo_core.evaluation.latency import Latency, WarmUp, measure_latency
from dipgo_core.evaluation.load import QUIET, CpuWatch, Finding, GpuWatch, undisturbed
from dipgo_core.evaluation.nvml import Gpu
from dipgo_core.evaluation.stopwatch import Timed
from orchestrator.records import Task
from orchestrator.store import FolderStore
from orchestrator.task import latency
from orchestrator.task.latency import _energy, _watches, measure, run_latency
from orchestrator.task.work import Work

ONE = Timed(1.0)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the worker does, in order; nothing is measured."""
    done: list[str] = []
    monkeypatch.setattr(latency.loaded, "cache_clear", lambda: done.append("freed"))
    monkeypatch.setattr(latency, "device_name", lambda kind: f"a {kind}")

    def measured(task: Task, store_url: str) -> dict[str, Any]:
        done.append("measured")
        return {"usable": True}

    monkeypatch.setattr(latency, "measured_apart", measured)
    return done


def work(tmp_path: Path, *, gpus: float, device: str) -> Work:
    inputs = {"device": device, "threads": 2}
    task = Task(kind="latency", inputs=inputs, gpus=gpus, exclusive=True)
    return Work(task, FolderStore(tmp_path), lambda report: None)


def test_worker_frees_the_gpu_before_it_measures(log: list[str], tmp_path: Path) -> None:
    outcome = run_latency(work(tmp_path, gpus=1, device="a cuda"))
    assert log == ["freed", "measured"]
    assert outcome.outputs == {"usable": True}


def test_worker_on_a_cpu_keeps_its_pipelines(log: list[str], tmp_path: Path) -> None:
    run_latency(work(tmp_path, gpus=0, device="a cpu"))
    assert log == ["measured"]


def test_worker_with_another_device_measures_nothing(log: list[str], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="planned for 'a H100', this worker has 'a cuda'"):
        run_latency(work(tmp_path, gpus=1, device="a H100"))
    assert log == []


def energies_of(runs: Mapping[str, Any], gpu: Gpu) -> dict[str, float]:
    """A meter of 8 J a dense run and 4 J a pruned one."""
    if gpu.handle == "silent":
        raise DeviceError("the GPU does not tell its energy: Not Supported")
    return {"dense": 8.0, "pruned": 4.0}


def test_energy_is_per_image_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "energies_j", energies_of)
    assert _energy({}, Gpu("counting"), 4) == {"dense_j": 2, "pruned_j": 1}
    assert "Not Supported" in _energy({}, Gpu("silent"), 4)["unread"]
    assert _energy({}, "no driver", 4) == {"unread": "no driver"}


class Steps:
    """What a measurement does, in order, on a quiet machine whose warm-ups are as told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *warmups: WarmUp) -> None:
        self.done: list[str] = []
        once = measure_latency(int, int, warmup=0, min_runs=2, min_seconds=0, timer=lambda run: ONE)
        self._found = (replace(once, warmup=warmup) for warmup in warmups)
        fakes = {
            "_wake": lambda work: self.done.append("wake"),
            "_clock": lambda work, gpu: self.done.append("clock"),
            "_footprint": self.footprint,
            "measure_latency": self.measure_latency,
            "_watches": lambda *args: [self],
            "undisturbed": partial(undisturbed, pause_seconds=0),
            **dict.fromkeys(("_runs", "_timer"), lambda work: (None, None)),
            **dict.fromkeys(("attention_in_use", "compile_mode"), lambda denoiser: "default"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(latency, name, fake)

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
        settings = ("threads", "batch_size", "warmup", "max_warmup", "min_runs", "min_seconds")
        inputs = {**dict.fromkeys(settings, 1), "threads": torch.get_num_threads()}
        model = SimpleNamespace(denoiser=None, settings=SimpleNamespace(dtype="float32"))
        task = Task(kind="latency", inputs=inputs, options={"tries": 2})
        work: Any = SimpleNamespace(task=task, device="cpu", model=model)
        return measure(work, parent=1)


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


def test_gpu_is_watched_beside_the_processor(tmp_path: Path) -> None:
    task = work(tmp_path, gpus=1, device="a cuda")
    processor, gpu = _watches(task, Gpu("quiet"), 1)
    assert (processor, type(gpu)) == (CpuWatch(threads=2), GpuWatch)


def test_gpu_that_cannot_be_watched_is_said_to_be_unchecked(tmp_path: Path) -> None:
    _, unwatched = _watches(work(tmp_path, gpus=1, device="a cuda"), "no driver", 1)
    assert unwatched.idle() == unwatched.stop()
    assert unwatched.stop().unchecked == ("load and processes of the GPU: no driver",)
    assert len(_watches(work(tmp_path, gpus=0, device="a cpu"), "no GPU is used", 1)) == 1
