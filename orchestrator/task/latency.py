"""Latency of one gate table: dense and pruned pipeline calls interleaved on this device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import TaskError
from dipgo_core.evaluation.device import device_name
from dipgo_core.evaluation.generate import call_arguments
from dipgo_core.evaluation.latency import (
    Run,
    cuda_milliseconds,
    measure_latency,
    wall_milliseconds,
)
from dipgo_core.evaluation.prompts import item_of_image
from dipgo_core.evaluation.protocol import image_seed
from dipgo_core.pipelines import set_sampler, subnet_of
from dipgo_core.runtime import apply_subnet
from dipgo_core.subnet import SubNet
from orchestrator.task.work import Outcome, Work

#: Pairs are repeated at least this long, so that very short runs are not measured by few ticks.
MIN_SECONDS = 1.0


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
        """Set the pipeline up and yield the call that is timed."""
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


def run_latency(work: Work) -> Outcome:
    """Measure on the device that was planned with, alone on the node.

    Raises:
        TaskError: this worker has another device.
    """
    inputs = work.task.inputs
    if device_name(work.device) != inputs["device"]:
        raise TaskError(
            f"latency was planned for {inputs['device']!r}, this worker has "
            f"{device_name(work.device)!r}: run the sweep from a machine like its workers"
        )
    dense = PipelineRun(work, SamplerSettings(**inputs["dense_sampler"]), None)
    whole = bool(work.gates.keep.all())
    subnet = None if whole else subnet_of(work.model, work.graph, work.sampler, work.gates)
    latency = measure_latency(
        dense,
        PipelineRun(work, work.sampler, subnet),
        warmup=int(inputs["warmup"]),
        min_runs=int(inputs["min_runs"]),
        min_seconds=MIN_SECONDS,
        device=work.device,
        dtype=work.model.settings.dtype,
        timer=_timer(work.device),
    )
    return Outcome(latency.to_json())


def _timer(device: str) -> Callable[[Run], float]:
    """Time the prepared call alone."""
    milliseconds = cuda_milliseconds if device == "cuda" else wall_milliseconds

    def time_of(run: Run) -> float:
        assert isinstance(run, PipelineRun)
        with run.prepared() as call:
            return milliseconds(call)

    return time_of
