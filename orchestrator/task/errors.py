"""Measured errors of single reuses, from the last checkpoint if there is one."""

from __future__ import annotations

from collections.abc import Iterator

import safetensors.torch

from dipgo_core.errors import TaskError
from dipgo_core.search import SearchProblem
from dipgo_core.search.errors import ErrorsProgress, measure_errors
from dipgo_core.strategies import ErrorsSettings
from orchestrator.task.dense import LATENTS_FILE
from orchestrator.task.steps import State, run_steps
from orchestrator.task.work import Outcome, Work, items_and_seeds

ERRORS_FILE = "errors.safetensors"


def run_errors(work: Work) -> Outcome:
    """Measure, keeping a checkpoint every few seconds; all searches of the model share the file."""
    done = run_steps(work, lambda resume: _measured(work, resume))
    last = done.last
    if last is None or last.errors is None:
        raise TaskError(f"the task {work.task.label} ended without errors")
    outputs = {
        "forwards": last.forwards,
        "sample_forwards": last.sample_forwards,
        "seconds": last.seconds,
        "peak_memory_bytes": done.peak_memory_bytes,
    }
    data = safetensors.torch.save(last.errors.to_tensors())
    return Outcome(outputs, work.put(ERRORS_FILE, data))


def _measured(work: Work, resume: State | None) -> Iterator[ErrorsProgress]:
    items, seeds = items_and_seeds(work)
    latents = work.store.get_artifact(work.reference, LATENTS_FILE)
    return measure_errors(
        SearchProblem(
            model=work.model,
            graph=work.graph,
            sampler=work.sampler,
            settings=ErrorsSettings(**work.task.inputs["errors"]).search,
            items=items,
            seeds=seeds,
            dense_latents=safetensors.torch.load(latents)["latents"],
            resume=resume,
        )
    )
