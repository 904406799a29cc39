"""Device names, found without torch."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dipgo_core.evaluation import device
from dipgo_core.evaluation.device import cpu_name, device_name


def test_cpu_name_is_the_model_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Fast   CPU @ 2 GHz\nflags\t: a b\n")

    assert cpu_name(file) == "Fast CPU @ 2 GHz"


def test_cpu_name_is_never_empty(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "missing")
    assert device_name()


def test_gpu_name_is_the_drivers(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = subprocess.CompletedProcess([], 0, stdout="NVIDIA Fast\nNVIDIA Slow\n")
    monkeypatch.setattr(device.subprocess, "run", lambda *_, **__: answer)

    assert device_name("cuda:0") == "NVIDIA Fast"


def test_gpu_without_driver_is_called_by_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(device.subprocess, "run", absent)

    assert device_name("cuda") == "cuda"
    assert device_name("mps") == "mps"
