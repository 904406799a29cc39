"""The worker's side of a latency task: the device is the planned one, and the GPU is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import TaskError
from orchestrator.records import Task
from orchestrator.store import open_store
from orchestrator.task import latency
from orchestrator.task.latency import run_latency
from orchestrator.task.work import Work


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
    return Work(task, open_store(tmp_path), lambda report: None)


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
