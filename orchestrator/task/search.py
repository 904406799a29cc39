"""One search, with a checkpoint every few seconds from which it goes on."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dipgo_core.config import LossSettings, SearchSettings
from dipgo_core.errors import TaskError
from dipgo_core.search import STRATEGIES, SearchProblem, SearchProgress
from orchestrator.task.work import Outcome, Work, items_and_seeds

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY_S = 5.0
CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.json"


def run_search(work: Work) -> Outcome:
    """Search, keeping a checkpoint every few seconds, from the last checkpoint if there is one."""
    fields = dict(work.task.inputs["search"])
    settings = SearchSettings(**{**fields, "loss": LossSettings(**fields["loss"])})
    items, seeds = items_and_seeds(work)
    latents = work.store.get_artifact(work.reference, "latents.safetensors")
    resume, curve = _checkpoint(work)
    problem = SearchProblem(
        model=work.model,
        graph=work.graph,
        sampler=work.sampler,
        settings=settings,
        items=items,
        seeds=seeds,
        dense_latents=safetensors.torch.load(latents)["latents"],
        resume=resume,
        **work.task.options.get("memory", {}),
    )
    last: SearchProgress | None = None
    saved = time.monotonic()
    for last in STRATEGIES[settings.strategy](problem):
        curve = [row for row in curve if row["search_step"] < last.search_step]
        curve.append(last.to_json())
        work.report(_figures(last))
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            _save_checkpoint(work, last, curve)
            saved = time.monotonic()
    if last is None or last.outcome is None:
        raise TaskError(f"the search {work.task.label} ended without an outcome")
    columns = {name: [row[name] for row in curve] for name in last.to_json()}
    outputs = {
        "outcome": last.outcome.to_json(),
        "curve": columns,
        "forwards": last.forwards,
        "seconds": last.seconds,
    }
    return Outcome(outputs, work.put(CURVE, json.dumps(columns).encode()))


def _figures(progress: SearchProgress) -> dict[str, Any]:
    names = ("search_step", "num_steps", "loss", "compute_ratio")
    return {name: getattr(progress, name) for name in names}


def _save_checkpoint(work: Work, progress: SearchProgress, curve: list[dict[str, Any]]) -> None:
    """Write the curve into the same object, so that both are of one step."""
    rows = torch.frombuffer(bytearray(json.dumps(curve).encode()), dtype=torch.uint8)
    state = safetensors.torch.save({**progress.state(), CURVE: rows})
    work.store.put_progress(work.task.key, CHECKPOINT, state)


def _checkpoint(work: Work) -> tuple[dict[str, Tensor] | None, list[dict[str, Any]]]:
    key = work.task.key
    data = work.store.get_progress(key, CHECKPOINT)
    if data is None:
        return None, []
    try:
        state = safetensors.torch.load(data)
        curve = json.loads(state.pop(CURVE).numpy().tobytes())
        return state, curve
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("the checkpoint of %s is damaged (%s): starting anew", key[:12], error)
        return None, []
