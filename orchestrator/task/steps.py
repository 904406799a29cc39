"""Work done in steps, with a checkpoint every few seconds from which it goes on."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dipgo_core.evaluation.footprint import reset_resident_peak, resident_peak
from orchestrator.task.work import Work

logger = logging.getLogger(__name__)

CHECKPOINT_EVERY_S = 5.0
CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.json"
#: Figures of a step that people are shown.
_SHOWN = ("search_step", "num_steps", "loss", "compute_ratio")

State = Mapping[str, Tensor]
Rows = list[dict[str, Any]]


class Step(Protocol):
    """One step of a search, or of a measurement. Steps are numbered: `search_step` of the row."""

    def state(self) -> dict[str, Tensor]: ...
    def to_json(self) -> dict[str, Any]: ...


S = TypeVar("S", bound=Step)


@dataclass(frozen=True, eq=False)
class Stepped(Generic[S]):
    """What steps came to: the last of them, a row of figures of each, and `peak_memory_bytes`.

    The last one is of tensors on the GPU, or of the whole process with weights and libraries where
    there is none, since the last interruption; None where nobody tells it.
    """

    last: S | None
    rows: Rows
    peak_memory_bytes: int | None


def run_steps(work: Work, begin: Callable[[State | None], Iterator[S]]) -> Stepped[S]:
    """Do all steps, from the last checkpoint if there is one.

    begin: given the state to go on from, yields step after step.
    """
    resume, rows = _checkpoint(work)
    told = reset_resident_peak() if work.device == "cpu" else True  # a GPU's: as the task began
    last: S | None = None
    saved = time.monotonic()
    for last in begin(resume):
        row = last.to_json()
        rows = [known for known in rows if known["search_step"] < row["search_step"]]
        rows.append(row)
        work.report({name: row[name] for name in _SHOWN if name in row})
        if time.monotonic() - saved > CHECKPOINT_EVERY_S:
            _save_checkpoint(work, last, rows)
            saved = time.monotonic()
    return Stepped(last, rows, _peak(work.device) if told else None)


def _peak(device: str) -> int | None:
    return resident_peak() if device == "cpu" else torch.cuda.max_memory_allocated()


def _save_checkpoint(work: Work, step: Step, rows: Rows) -> None:
    """Write the rows into the same object, so that both are of one step."""
    text = torch.frombuffer(bytearray(json.dumps(rows).encode()), dtype=torch.uint8)
    state = safetensors.torch.save({**step.state(), CURVE: text})
    work.store.put_progress(work.task.key, CHECKPOINT, state)


def _checkpoint(work: Work) -> tuple[dict[str, Tensor] | None, Rows]:
    key = work.task.key
    data = work.store.get_progress(key, CHECKPOINT)
    if data is None:
        return None, []
    try:
        state = safetensors.torch.load(data)
        rows = json.loads(state.pop(CURVE).numpy().tobytes())
        return state, rows
    except (SafetensorError, KeyError, ValueError) as error:
        logger.warning("the checkpoint of %s is damaged (%s): starting anew", key[:12], error)
        return None, []
