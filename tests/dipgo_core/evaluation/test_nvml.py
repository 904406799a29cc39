"""The driver's answers, by a fake of the driver that records what it is asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dipgo_core.errors import DeviceError
from dipgo_core.evaluation import nvml
from dipgo_core.evaluation.device import clock_mhz, device_name, gpu_memory_bytes
from dipgo_core.evaluation.nvml import open_gpu


class NotSupported(Exception):
    """What the driver raises."""


class FakeDriver:
    """Two GPUs; the second one, a slice of a GPU, tells little."""

    NVMLError = NotSupported
    NVML_CLOCK_SM = 1

    def nvmlInit(self) -> None: ...

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return ("GPU-one", "MIG-two")[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return {"GPU-one": b"NVIDIA Fast", "MIG-two": b"NVIDIA Slice"}[handle]

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return self._told(handle, 1410)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return self._told(handle, SimpleNamespace(gpu=37))

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> Any:
        return self._told(handle, [SimpleNamespace(pid=1), SimpleNamespace(pid=7)])

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self._told(handle, 5000)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return self._told(handle, SimpleNamespace(total=80_000_000_000))

    def _told(self, handle: str, value: Any) -> Any:
        if handle == "MIG-two":
            raise NotSupported("Not Supported")
        return value


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(nvml, "pynvml", FakeDriver())


@pytest.mark.usefixtures("driver")
def test_gpu_tells_what_it_is_asked() -> None:
    gpu = open_gpu()

    assert (gpu.name(), gpu.sm_clock_mhz(), gpu.busy_percent()) == ("NVIDIA Fast", 1410, 37)
    assert gpu.compute_pids() == {1, 7}
    assert gpu.energy_mj() == 5000
    assert gpu.memory_bytes() == gpu_memory_bytes() == 80_000_000_000
    assert clock_mhz("cuda", gpu) == 1410


@pytest.mark.usefixtures("driver")
@pytest.mark.parametrize("visible", ["1", "1,0", "MIG-two"])
def test_open_gpu_is_the_first_visible_one(visible: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    assert open_gpu().name() == "NVIDIA Slice"
    assert device_name("cuda:0") == "NVIDIA Slice"
    assert open_gpu("GPU-one").name() == "NVIDIA Fast"


@pytest.mark.usefixtures("driver")
def test_what_a_device_does_not_tell_is_an_error_that_says_so() -> None:
    gpu = open_gpu("MIG-two")

    with pytest.raises(DeviceError, match="does not tell its energy: Not Supported"):
        gpu.energy_mj()
    assert clock_mhz("cuda", gpu) is None


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoDriver(FakeDriver):
        def nvmlInit(self) -> None:
            raise NotSupported("NVML Shared Library Not Found")

    monkeypatch.setattr(nvml, "pynvml", NoDriver())

    with pytest.raises(DeviceError, match="Not Found"):
        open_gpu()
    assert device_name("cuda") == "cuda"
