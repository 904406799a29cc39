"""Latency of one gate table: dense and pruned pipeline calls interleaved, in their own process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import TaskError
from dipgo_core.evaluation.device import device_name
from dipgo_core.evaluation.prompts import item_of_image
from dipgo_core.evaluation.protocol import image_seed
from dipgo_core.evaluation.side_by_side import Effort, PreparedRun, measure_side_by_side
from dipgo_core.evaluation.stopwatch import Run
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.subnet import SubNet
from dipgo_core.unguided import guidance_followed
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


def measure(work: Work, parent: int) -> dict[str, Any]:
    """Measure in this process, which does nothing else; return a latency record's outputs.

    parent: process id of the worker that asked, whose processes are no foreign ones.
    """
    inputs = work.task.inputs
    torch.set_num_threads(int(inputs["threads"]))
    dense, pruned = _runs(work)
    effort = Effort(
        batch_size=int(inputs["batch_size"]),
        warmup=int(inputs["warmup"]),
        max_warmup=int(inputs["max_warmup"]),
        min_runs=int(inputs["min_runs"]),
        min_seconds=float(inputs["min_seconds"]),
        tries=int(work.task.options["tries"]),
    )
    return measure_side_by_side(work.model, dense, pruned, effort, parent=parent)


def _runs(work: Work) -> tuple[PreparedRun, PreparedRun]:
    whole = bool(work.gates.keep.all())
    subnet = None if whole else subnet_of(work.model, work.graph, work.sampler, work.gates)
    dense = SamplerSettings(**work.task.inputs["dense_sampler"])
    return (
        PreparedRun(lambda: _prepared(work, dense, None)),
        PreparedRun(lambda: _prepared(work, work.sampler, subnet)),
    )


@contextmanager
def _prepared(work: Work, sampler: SamplerSettings, subnet: SubNet | None) -> Iterator[Run]:
    """Set the pipeline up and yield the call that is timed; it may be repeated."""
    model, size = work.model, int(work.task.inputs["batch_size"])
    set_sampler(model, sampler)
    items = [work.items[item_of_image(i, len(work.items))] for i in range(size)]
    seeds = [image_seed(0, "latency", i) for i in range(size)]
    arguments = call_arguments(model, items, seeds, sampler)
    gated = nullcontext() if subnet is None else apply_subnet(model.pipe, subnet)
    with gated, guidance_followed(model, sampler, size):
        yield lambda: model.pipe(**arguments)
