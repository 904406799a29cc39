"""One search, from its last checkpoint if there is one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import safetensors.torch
from torch import Tensor

from dipgo_core.config import LossSettings, SearchSettings
from dipgo_core.errors import SearchDivergedError, TaskError
from dipgo_core.gates import GateTable
from dipgo_core.outcome import SearchOutcome
from dipgo_core.search import STRATEGIES, SearchProblem, SearchProgress
from orchestrator.task.dense import LATENTS_FILE
from orchestrator.task.errors import ERRORS_FILE
from orchestrator.task.steps import CURVE, State, run_steps
from orchestrator.task.work import Outcome, Work, items_and_seeds

#: The outcome of the last good step of a search that was stopped.
LAST_GOOD = "last_good.json"


def run_search(work: Work) -> Outcome:
    """Search, keeping a checkpoint every few seconds."""
    settings = search_settings(work.task.inputs["search"])

    def begin(resume: State | None) -> Iterator[SearchProgress]:
        return STRATEGIES[settings.strategy](_problem(work, settings, resume))

    try:
        done = run_steps(work, begin)
    except SearchDivergedError as error:
        if error.outcome is None:
            raise
        raise _with_last_good(work, error) from error
    last = done.last
    if last is None or last.outcome is None:
        raise TaskError(f"the search {work.task.label} ended without an outcome")
    columns = {name: [row[name] for row in done.rows] for name in last.to_json()}
    outputs = {
        "outcome": last.outcome.to_json(),
        "curve": columns,
        "forwards": last.forwards,
        "sample_forwards": last.sample_forwards,
        "seconds": last.seconds,
        "peak_memory_bytes": done.peak_memory_bytes,
        **_share(last.outcome),
    }
    return Outcome(outputs, work.put(CURVE, json.dumps(columns).encode()))


def _with_last_good(work: Work, error: SearchDivergedError) -> SearchDivergedError:
    """Keep what a search that leads nowhere had found before, and say where."""
    data = json.dumps(error.outcome.to_json()).encode()
    work.store.put_progress(work.task.key, LAST_GOOD, data)
    where = f"kept as progress/{work.task.key}/{LAST_GOOD} in {work.store.url}"
    return SearchDivergedError(f"{error}, {where}", error.outcome)


def search_settings(fields: Mapping[str, Any]) -> SearchSettings:
    """Return the settings that a task's inputs hold; what they leave out is read by nobody."""
    loss = {"loss": LossSettings(**fields["loss"])} if "loss" in fields else {}
    return SearchSettings(**{**fields, **loss})


def _problem(work: Work, settings: SearchSettings, resume: State | None) -> SearchProblem:
    items, seeds = items_and_seeds(work)
    latents = work.store.get_artifact(work.reference, LATENTS_FILE)
    return SearchProblem(
        model=work.model,
        graph=work.graph,
        sampler=work.sampler,
        settings=settings,
        items=items,
        seeds=seeds,
        dense_latents=safetensors.torch.load(latents)["latents"],
        resume=resume,
        step_masks=_step_masks(work),
        errors=_errors(work),
        **_budget(work.task.inputs),
        **work.task.options.get("memory", {}),
    )


def _budget(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a search at one target may spend; others serve all targets."""
    if "target" not in inputs:
        return {}
    convention = inputs.get("macs_convention", "all")
    return {"targets": (float(inputs["target"]),), "convention": convention}


def _step_masks(work: Work) -> dict[int, tuple[int, ...]] | None:
    """Return the step masks that the search begins with, if it does."""
    key = work.task.inputs.get("step_masks")
    if key is None:
        return None
    found = SearchOutcome.from_json(work.record(key).outputs["outcome"]).step_masks
    return None if found is None else dict(found)


def _errors(work: Work) -> dict[str, Tensor] | None:
    """Return the measured errors of reuses that the search goes by, if it does."""
    key = work.task.inputs.get("errors")
    if key is None:
        return None
    data = work.store.get_artifact(work.record(key), ERRORS_FILE)
    found: dict[str, Tensor] = safetensors.torch.load(data)
    return found


def _share(outcome: SearchOutcome) -> dict[str, float]:
    """Return the share of calls that are computed whole or skipped whole, of a search at one
    target; where a search serves all targets, evaluations tell it."""
    tables = [GateTable.from_strings(rows) for rows in (outcome.tables or {}).values()]
    return {"all_or_nothing_share": tables[0].all_or_nothing_share} if len(tables) == 1 else {}
