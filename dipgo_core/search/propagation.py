"""How much a change of one call's prediction reaches the result: measured at a few calls.

One dense run, and one run each of at most PROBES calls spread over the run, in which that call
alone is skipped. What the skip changes in the guided prediction, and what that changes in the
result, in mean squares: their ratio is the call's weight. Between probed calls the logarithm of the
weight is interpolated. So it takes PROBES + 1 dense runs at any number of calls, holds nothing of
earlier calls but one prediction, and the change probed is of the kind that reuses make.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dipgo_core.errors import SearchError
from dipgo_core.hooks import MethodHook, install
from dipgo_core.pipelines import LoadedModel
from dipgo_core.repeat import Repeat, repeat_of
from dipgo_core.sampling import noise_scheduler, rollout
from dipgo_core.search.calibration import batch_of
from dipgo_core.search.guidance import Guidance, learned_guidance
from dipgo_core.search.objective import SMALLEST, Space
from dipgo_core.search.progress import SearchProblem
from dipgo_core.strategies import PROBED_ITEMS
from dipgo_core.structures import Tensors

#: Runs in which one call is skipped.
PROBES = 6


@dataclass(frozen=True, eq=False)
class Propagation:
    """Weights of the calls: share of the result's variance a unit of mean square there makes.

    weights: (T,) float64; the first call's, which is never reused, is 0.
    """

    weights: Tensor
    guidance: Guidance

    def to_tensors(self) -> dict[str, Tensor]:
        return {
            "weights": self.weights.clone(),
            "guidance": self.guidance.weights.cpu().clone(),
            "channels": torch.tensor(self.guidance.channels),
        }


def measure_propagation(problem: SearchProblem, num_calls: int) -> tuple[Propagation, int, float]:
    """Return the weights of all calls, and the forwards and sample forwards it took.

    Items: the first PROBED_ITEMS of the problem. Errors are taken where `objective` says.

    Raises:
        SearchError: a result that is not finite.
    """
    items = range(min(PROBED_ITEMS, len(problem.items)))
    batch = batch_of(problem, items)
    space = Space(problem.model, problem.settings.objective)
    scheduler = noise_scheduler(problem.model, problem.sampler)
    policy = _SkipOne(problem.model, len(batch), repeat_of(scheduler))
    calls = np.unique(np.linspace(1, num_calls - 1, min(PROBES, num_calls - 1)).round().astype(int))

    def result(skipped: int | None) -> Tensor:
        policy.skipped = skipped
        return space.of(rollout(problem.model, batch, problem.sampler, on_call=policy.start_call))

    handle = install(problem.model.denoiser, problem.graph, policy)
    try:
        with torch.no_grad():
            dense = result(None)
            weights = [_weight(result(int(call)), dense, policy) for call in calls]
    finally:
        handle.remove()
    logs = np.interp(np.arange(1, num_calls), calls, np.log(weights))
    found = torch.from_numpy(np.concatenate([[0.0], np.exp(logs)]))
    assert policy.guidance is not None
    forwards = num_calls * (1 + len(calls))
    return Propagation(found, policy.guidance), forwards, float(forwards * len(batch))


def loaded_propagation(state: Mapping[str, Tensor], device: torch.device) -> Propagation:
    """Return what `to_tensors` gave."""
    guidance = Guidance(state["guidance"].to(device), int(state["channels"]))
    return Propagation(state["weights"].clone(), guidance)


def _weight(result: Tensor, dense: Tensor, policy: _SkipOne) -> float:
    error = float((result - dense).double().square().mean() / dense.double().var())
    if not np.isfinite(error):
        raise SearchError(
            f"the result is not finite where call {policy.skipped} is skipped; set the model's "
            "dtype to float32"
        )
    return max(error, SMALLEST) / max(policy.size, SMALLEST)


class _SkipOne:
    """Policy that computes all calls, and gives at one of them what the call before gave."""

    def __init__(self, model: LoadedModel, size: int, repeat: Repeat) -> None:
        self.guidance: Guidance | None = None
        self.skipped: int | None = None
        self.size = 0.0
        self._before: Tensors = ()
        self._model, self._images, self._repeat = model, size, repeat

    def start_call(self, call: int) -> None:
        self._call = call
        if call == 0 and self.guidance is None:
            MethodHook(self._model.pipe.scheduler, "step", self._step)

    def _step(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if self.guidance is None:
            guided = args[0] if args else kwargs["model_output"]
            self.guidance = learned_guidance(self._first, guided, self._images)
        return step(*args, **kwargs)

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        now, at = compute(), self._repeat.at(sample, timestep)
        if self._call == 0:
            assert now[0] is not None
            self._first = now[0]
        if self._call == self.skipped:
            assert self.guidance is not None
            repeated = at.predictions(self._before)
            assert now[0] is not None and repeated[0] is not None
            self.size = float(self.guidance.of(repeated[0] - now[0]).double().square().mean())
            return repeated
        self._before = at.repeatable(now)
        return now

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        return compute()
