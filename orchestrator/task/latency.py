"""Latency of one gate table: dense and pruned pipeline calls interleaved, in their own process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import DeviceError, TaskError
from dipgo_core.evaluation.device import clock_mhz, device_name
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
from dipgo_core.evaluation.prompts import item_of_image
from dipgo_core.evaluation.protocol import image_seed
from dipgo_core.evaluation.stopwatch import Run, Timer, stopwatch_for, timed_call
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.subnet import SubNet
from orchestrator.task.latency_process import measured_apart
from orchestrator.task.scorers import loaded_scorer
from orchestrator.task.work import Outcome, Work, loaded


def run_latency(work: Work) -> Outcome:
    """Let the measuring process measure, while this one waits and keeps the device free.

    Raises:
        TaskError: this worker has another device, or the measuring process died.
    """
    planned, found = work.task.inputs["device"], device_name(work.device)
    if found != planned:
        raise TaskError(
            f"latency was planned for {planned!r}, this worker has {found!r}: run the sweep again, "
            "or name one accelerator in resources.latency.accelerator"
        )
    if work.device != "cpu":
        loaded.cache_clear()
        loaded_scorer.cache_clear()
        gc.collect()
        torch.cuda.empty_cache()
    return Outcome(measured_apart(work.task, work.store.url))


@dataclass(frozen=True, eq=False)
class PipelineRun:
    """One way to call the pipeline. What a user does once (sampler, SubNet) is not timed."""

    work: Work
    sampler: SamplerSettings
    subnet: SubNet | None

    def __call__(self) -> None:
        with self.prepared() as call:
            call()

    @contextmanager
    def prepared(self) -> Iterator[Callable[[], object]]:
        """Set the pipeline up and yield the call that is timed; it may be repeated."""
        model, size = self.work.model, int(self.work.task.inputs["batch_size"])
        set_sampler(model, self.sampler)
        items = [self.work.items[item_of_image(i, len(self.work.items))] for i in range(size)]
        seeds = [image_seed(0, "latency", i) for i in range(size)]
        arguments = call_arguments(model, items, seeds, self.sampler)
        with self._applied():
            yield lambda: model.pipe(**arguments)

    def _applied(self) -> AbstractContextManager[object]:
        if self.subnet is None:
            return nullcontext()
        return apply_subnet(self.work.model.pipe, self.subnet)


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


def measure(work: Work, parent: int) -> dict[str, Any]:
    """Measure in this process, which does nothing else; return a latency record's outputs.

    What had not settled is measured again, like what was disturbed. parent: process id of the
    worker that asked, whose processes are no foreign ones.
    """
    torch.set_num_threads(int(work.task.inputs["threads"]))
    dense, pruned = _runs(work)
    gpu = _gpu() if work.device != "cpu" else "no GPU is used"
    _wake(work)
    watched = undisturbed(
        lambda: _measured(work, dense, pruned, gpu),
        _watches(work, gpu, parent),
        tries=int(work.task.options["tries"]),
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
        "attention": attention_in_use(work.model.denoiser),
        "compile": compile_mode(work.model.denoiser),
        "versions": {**found.latency.versions, **library_versions()},
        **found.footprint,
    }


def _wake(work: Work) -> None:
    """Load the model, and on a GPU run a kernel: a process is listed there once it has done so."""
    model = work.model
    if work.device != "cpu":
        torch.zeros(1, device=model.device).add_(1)
        torch.cuda.synchronize()


def _runs(work: Work) -> tuple[PipelineRun, PipelineRun]:
    dense = PipelineRun(work, SamplerSettings(**work.task.inputs["dense_sampler"]), None)
    whole = bool(work.gates.keep.all())
    subnet = None if whole else subnet_of(work.model, work.graph, work.sampler, work.gates)
    return dense, PipelineRun(work, work.sampler, subnet)


#: A GPU as its driver knows it, or why there is none.
MaybeGpu = Gpu | str


def _gpu() -> MaybeGpu:
    """Return the GPU that PyTorch computes on."""
    try:
        return open_gpu(f"GPU-{torch.cuda.get_device_properties(0).uuid}")
    except DeviceError as error:
        return str(error)


def _watches(work: Work, gpu: MaybeGpu, parent: int) -> list[Watch]:
    watches: list[Watch] = [CpuWatch(threads=int(work.task.inputs["threads"]))]
    if isinstance(gpu, Gpu):
        watches.append(GpuWatch(gpu, lambda: process_tree(parent)))
    elif work.device != "cpu":
        watches.append(Unwatched(f"load and processes of the GPU: {gpu}"))
    return watches


def _clock(work: Work, gpu: MaybeGpu) -> float | None:
    return clock_mhz(work.device, gpu if isinstance(gpu, Gpu) else None)


def _measured(work: Work, dense: PipelineRun, pruned: PipelineRun, gpu: MaybeGpu) -> Measured:
    """Measure once; the clock is read around the runs that count, not before the warm-up."""
    inputs = work.task.inputs
    clocks: dict[str, float | None] = {}
    latency = measure_latency(
        dense,
        pruned,
        batch_size=int(inputs["batch_size"]),
        warmup=int(inputs["warmup"]),
        max_warmup=int(inputs["max_warmup"]),
        min_runs=int(inputs["min_runs"]),
        min_seconds=float(inputs["min_seconds"]),
        device=work.device,
        dtype=work.model.settings.dtype,
        timer=_timer(work),
        warmed=lambda: clocks.update(before=_clock(work, gpu)),
    )
    clocks["after"] = _clock(work, gpu)
    return Measured(latency=latency, clocks=clocks, footprint=_footprint(work, dense, pruned, gpu))


def _timer(work: Work) -> Timer:
    """Time the prepared call alone, and its denoising loop."""
    watch = stopwatch_for(work.device)

    def time_of(run: Run) -> Any:
        assert isinstance(run, PipelineRun)
        with run.prepared() as call:
            return timed_call(call, work.model.pipe.scheduler, work.model.denoiser, watch)

    return time_of


def _footprint(
    work: Work, dense: PipelineRun, pruned: PipelineRun, gpu: MaybeGpu
) -> dict[str, Any]:
    """Return peak memory of both kinds of run, and their energy an image where it is told."""
    runs = {"dense": dense.prepared, "pruned": pruned.prepared}
    memory = dict[str, Any]()
    for name, prepared in runs.items():
        with prepared() as call:
            memory[name] = asdict(peak_memory(call, work.device))
    return {"memory": memory, "energy": _energy(runs, gpu, int(work.task.inputs["batch_size"]))}


def _energy(runs: Mapping[str, Prepared], gpu: MaybeGpu, images: int) -> dict[str, Any]:
    if isinstance(gpu, str):
        return {"unread": gpu}
    try:
        drawn = energies_j(runs, gpu)
    except DeviceError as error:
        return {"unread": str(error)}
    return {f"{name}_j": joules / images for name, joules in drawn.items()}
