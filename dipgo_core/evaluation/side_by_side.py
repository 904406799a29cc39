"""Side by side: two ways to call one pipeline, timed in turn on a device that is watched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dipgo_core.errors import DeviceError
from dipgo_core.evaluation.device import clock_mhz
from dipgo_core.evaluation.execution import attention_in_use, compile_mode, library_versions
from dipgo_core.evaluation.footprint import Prepared, energies_j, peak_memory
from dipgo_core.evaluation.latency import WINDOW, Latency, measure_latency
from dipgo_core.evaluation.load import (
    CpuWatch,
    GpuWatch,
    Unwatched,
    Watch,
    process_tree,
    undisturbed,
)
from dipgo_core.evaluation.nvml import Gpu, open_gpu
from dipgo_core.evaluation.stopwatch import Run, Timed, Timer, stopwatch_for, timed_call
from dipgo_core.pipelines import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long is measured: as `measure_latency` takes it; tries: of what was disturbed."""

    batch_size: int = 1
    warmup: int = 2
    max_warmup: int = 20
    min_runs: int = 10
    min_seconds: float = 5.0
    tries: int = 3


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """One way to call a pipeline. What a user does once (sampler, SubNet) is not timed."""

    prepared: Prepared

    def __call__(self) -> None:
        with self.prepared() as call:
            call()


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measurement: times, clocks before and after them, memory and energy."""

    latency: Latency
    clocks: Mapping[str, float | None]
    footprint: Mapping[str, Any]

    @property
    def settled(self) -> bool:
        """Whether the warm-up came to rest, or was not given the pairs to be judged by."""
        warmup = self.latency.warmup
        return warmup.stable is not False or warmup.pairs < 2 * WINDOW


#: A GPU as its driver knows it, or why there is none.
MaybeGpu = Gpu | str


def measure_side_by_side(
    model: LoadedModel,
    dense: PreparedRun,
    pruned: PreparedRun,
    effort: Effort,
    *,
    parent: int | None = None,
) -> dict[str, Any]:
    """Measure in this process, which does nothing else; return a latency record's outputs.

    What had not settled is measured again, like what was disturbed. parent: process whose children
    are no foreign load (this one if None).
    """
    device = model.device.type
    gpu = find_gpu() if device != "cpu" else "no GPU is used"
    _wake(device)
    watched = undisturbed(
        lambda: _measured(model, dense, pruned, effort, gpu),
        watches_of(device, gpu, os.getpid() if parent is None else parent),
        tries=effort.tries,
        good=lambda found: found.settled,
    )
    found = watched.value
    return {
        **found.latency.to_json(),
        "usable": watched.finding.disturbed is None,
        "disturbed": watched.finding.disturbed,
        "unchecked": list(watched.finding.unchecked),
        "tries": watched.tries,
        "clock_mhz": found.clocks,
        "attention": attention_in_use(model.denoiser),
        "compile": compile_mode(model.denoiser),
        "versions": {**found.latency.versions, **library_versions()},
        **found.footprint,
    }


def _wake(device: str) -> None:
    """Run a kernel on a GPU: a process is listed there once it has done so."""
    if device != "cpu":
        torch.zeros(1, device=device).add_(1)
        torch.cuda.synchronize()


def find_gpu() -> MaybeGpu:
    """Return the GPU that PyTorch computes on."""
    try:
        return open_gpu(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    except DeviceError as error:
        return str(error)


def watches_of(device: str, gpu: MaybeGpu, parent: int) -> list[Watch]:
    """Return what looks for foreign load on the processor, and on the GPU that is used."""
    watches: list[Watch] = [CpuWatch(threads=torch.get_num_threads())]
    if isinstance(gpu, Gpu):
        watches.append(GpuWatch(gpu, lambda: process_tree(parent)))
    elif device != "cpu":
        watches.append(Unwatched(f"load and processes of the GPU: {gpu}"))
    return watches


def _clock(device: str, gpu: MaybeGpu) -> float | None:
    return clock_mhz(device, gpu if isinstance(gpu, Gpu) else None)


def _measured(
    model: LoadedModel, dense: PreparedRun, pruned: PreparedRun, effort: Effort, gpu: MaybeGpu
) -> Measured:
    """Measure once; the clock is read around the runs that count, not before the warm-up."""
    device = model.device.type
    clocks: dict[str, float | None] = {}
    latency = measure_latency(
        dense,
        pruned,
        batch_size=effort.batch_size,
        warmup=effort.warmup,
        max_warmup=effort.max_warmup,
        min_runs=effort.min_runs,
        min_seconds=effort.min_seconds,
        device=device,
        dtype=model.settings.dtype,
        timer=_timer(model),
        warmed=lambda: clocks.update(before=_clock(device, gpu)),
    )
    clocks["after"] = _clock(device, gpu)
    runs = {"dense": dense.prepared, "pruned": pruned.prepared}
    footprint = _footprint(runs, device, gpu, effort.batch_size)
    return Measured(latency=latency, clocks=clocks, footprint=footprint)


def _timer(model: LoadedModel) -> Timer:
    """Time the prepared call alone, and its denoising loop."""
    watch = stopwatch_for(model.device)

    def time_of(run: Run) -> Timed:
        assert isinstance(run, PreparedRun)
        with run.prepared() as call:
            return timed_call(call, model.pipe.scheduler, model.denoiser, watch)

    return time_of


def _footprint(
    runs: Mapping[str, Prepared], device: str, gpu: MaybeGpu, images: int
) -> dict[str, Any]:
    """Return peak memory of both kinds of run, and their energy an image where it is told."""
    memory = dict[str, Any]()
    for name, prepared in runs.items():
        with prepared() as call:
            memory[name] = asdict(peak_memory(call, device))
    return {"memory": memory, "energy": energy_an_image(runs, gpu, images)}


def energy_an_image(runs: Mapping[str, Prepared], gpu: MaybeGpu, images: int) -> dict[str, Any]:
    """Return the joules an image takes by each kind of run, or why they were not read."""
    if isinstance(gpu, str):
        return {"unread": gpu}
    try:
        drawn = energies_j(runs, gpu)
    except DeviceError as error:
        return {"unread": str(error)}
    return {f"{name}_j": joules / images for name, joules in drawn.items()}
