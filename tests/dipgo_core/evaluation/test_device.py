"""Names and clocks of devices, found without torch."""

from __future__ import annotations

from pathlib import Path

from dipgo_core.evaluation.device import clock_mhz, cpu_mhz, cpu_name, device_name


def test_cpu_name_is_the_model_name(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: Fast   CPU @ 2 GHz\nflags\t: a b\n")

    assert cpu_name(file) == "Fast CPU @ 2 GHz"


def test_cpu_name_is_never_empty(tmp_path: Path) -> None:
    assert cpu_name(tmp_path / "missing")
    assert device_name()


def test_cpu_clock_is_the_mean_of_all_processors(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("cpu MHz\t\t: 3000.0\nflags\t: a\ncpu MHz\t\t: 2000.0\n")

    assert cpu_mhz(file) == 2500
    assert cpu_mhz(tmp_path / "missing") is None


def test_clock_of_a_gpu_without_driver_is_unknown() -> None:
    assert clock_mhz("cuda", None) is None


def test_unknown_device_is_called_by_its_kind() -> None:
    assert device_name("mps") == "mps"
