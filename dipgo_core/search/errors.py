"""Measured errors of single reuses: block n at call t, taken from a cache of age k.

One dense run, in which every call is evaluated again with one block's output of an earlier call:
what that changes in the prediction. One more run a call, with a mixture of those changes: how much
a change at that call does to what the objective looks at. So the cost of the first part grows with
T, that of the second with T squared over two, and only the outputs of `staleness` calls are held.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.errors import SearchError
from dipgo_core.graph import Reuse
from dipgo_core.hooks import MethodHook, install
from dipgo_core.repeat import Repeat, repeat_of
from dipgo_core.sampling import Batch, noise_scheduler, rollout
from dipgo_core.search.calibration import batch_of, check_problem, dense_latents
from dipgo_core.search.guidance import Guidance, learned_guidance
from dipgo_core.search.objective import SMALLEST, Space
from dipgo_core.search.progress import SearchProblem
from dipgo_core.strategies import PROBED_ITEMS
from dipgo_core.structures import Tensors


@dataclass(frozen=True, eq=False)
class ReuseErrors:
    """What single reuses do to what the objective looks at, in mean squares over its elements.

    covariances: (T, N * K, N * K) float64, entry (n * K + k - 1) of call t is block n reused at
    age k; off the diagonal how much two errors point the same way. Ages that call t cannot have are
    those of its oldest one. What the measurement cost: forwards, sample_forwards, seconds.
    """

    covariances: npt.NDArray[np.float64]
    forwards: int
    sample_forwards: float
    seconds: float

    def to_tensors(self) -> dict[str, Tensor]:
        return {
            "covariances": torch.from_numpy(self.covariances.copy()),
            "forwards": torch.tensor(self.forwards),
            "sample_forwards": torch.tensor(self.sample_forwards, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> ReuseErrors:
        return cls(
            covariances=tensors["covariances"].numpy().astype(np.float64),
            forwards=int(tensors["forwards"]),
            sample_forwards=float(tensors["sample_forwards"]),
            seconds=float(tensors["seconds"]),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ErrorsProgress:
    """One run of the measurement, counted from 1. errors: with the last one only."""

    search_step: int
    num_steps: int
    forwards: int
    sample_forwards: float
    seconds: float
    errors: ReuseErrors | None = None
    snapshot: Callable[[], dict[str, Tensor]] = field(repr=False)

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed measurement needs; fit for safetensors."""
        return self.snapshot()

    def to_json(self) -> dict[str, Any]:
        """Return the figures."""
        return {k: v for k, v in vars(self).items() if k not in ("errors", "snapshot")}


def measure_errors(problem: SearchProblem) -> Iterator[ErrorsProgress]:
    """Measure all reuses on a few calibration items; yield after every run, at last the errors.

    Raises:
        SearchError: values that are not finite, or a state of another measurement.
    """
    measurement = _Measurement(problem)
    handle = install(problem.model.denoiser, problem.graph, measurement.policy)
    try:
        yield from measurement.run()
    finally:
        handle.remove()


class _Measurement:
    """The dense run with its probes, then one run a call."""

    def __init__(self, problem: SearchProblem) -> None:
        check_problem(problem)
        self.problem = problem
        scheduler = noise_scheduler(problem.model, problem.sampler)
        self.num_calls = len(scheduler.timesteps)
        if self.num_calls < 2:
            raise SearchError("a search needs at least 2 denoiser calls, the sampler makes 1")
        self.chosen = chosen = list(range(min(PROBED_ITEMS, len(problem.items))))
        self.batch = batch_of(problem, chosen)
        self.forwards = 0
        self.sample_forwards = 0.0
        if problem.dense_latents is None:
            full, self.forwards = dense_latents(problem)
            self.sample_forwards = float(self.num_calls * len(problem.items))
        else:
            full = problem.dense_latents
        self.space = Space(problem.model, problem.settings.objective)
        self.target = self.space.of(full[chosen].to(problem.model.device))
        self.seconds = 0.0
        self.ages = min(problem.settings.staleness, self.num_calls - 1)
        self.probes = _Probes(problem, self.batch, repeat_of(scheduler), self.ages)
        self.policy = _Current(self.probes)

    @property
    def num_steps(self) -> int:
        return self.num_calls  # the dense run, and one a call but the first

    def run(self) -> Iterator[ErrorsProgress]:
        """The dense run is always made (a resumed one needs its predictions); the rest once."""
        started = time.perf_counter()
        self._rollout(self.probes)
        self.seconds += time.perf_counter() - started
        gains = self._resumed()
        if len(gains) in (0, self.num_calls - 1):  # begun, or interrupted before its record
            yield self.progress(gains)
        while len(gains) < self.num_calls - 1:
            started = time.perf_counter()
            gains.append(self._gain(len(gains) + 1))
            self.seconds += time.perf_counter() - started
            yield self.progress(gains)

    def progress(self, gains: list[float]) -> ErrorsProgress:
        done = 1 + len(gains)
        last = done == self.num_steps
        return ErrorsProgress(
            search_step=done,
            num_steps=self.num_steps,
            forwards=self.forwards,
            sample_forwards=self.sample_forwards,
            seconds=self.seconds,
            errors=self._errors(gains) if last else None,
            snapshot=lambda: self._state(gains),
        )

    def _errors(self, gains: list[float]) -> ReuseErrors:
        found = [np.zeros_like(self.probes.grams[0])]
        found += [gain * gram for gain, gram in zip(gains, self.probes.grams, strict=True)]
        return ReuseErrors(
            np.stack(found), self.forwards, round(self.sample_forwards, 6), self.seconds
        )

    @torch.no_grad()
    def _rollout(self, policy: _Probes | _Injection) -> Tensor:
        problem = self.problem
        self.policy.current = policy
        final = rollout(problem.model, self.batch, problem.sampler, on_call=policy.start_call)
        self.forwards += policy.forwards
        self.sample_forwards += policy.cost * len(self.batch)
        return final

    def _gain(self, call: int) -> float:
        """Return by how much a squared change of a call's prediction grows until the end."""
        change, size = self.probes.mixture(call)
        if size <= SMALLEST:
            return 0.0
        final = self._rollout(_Injection(self.probes.predictions, call, change))
        error = (self.space.of(final) - self.target).double().square().mean().item()
        if not np.isfinite(error):
            raise SearchError(
                f"the latents are not finite after a change of call {call}; set the model's dtype "
                f"to float32 (it is {self.problem.model.settings.dtype})"
            )
        return float(error / size)

    def _state(self, gains: list[float]) -> dict[str, Tensor]:
        spent = [self.forwards, self.sample_forwards, self.seconds]
        return {
            "gains": torch.tensor(gains, dtype=torch.float64),
            "spent": torch.tensor(spent, dtype=torch.float64),
        }

    def _resumed(self) -> list[float]:
        state = self.problem.resume
        if state is None:
            return []
        gains = state["gains"].tolist() if "gains" in state else None
        if gains is None or len(gains) >= self.num_calls:
            raise SearchError("the saved state belongs to another search; delete it and start anew")
        forwards, sample_forwards, seconds = state["spent"].tolist()
        self.forwards += int(forwards)
        self.sample_forwards += sample_forwards
        self.seconds += seconds
        return list(gains)


@dataclass(eq=False)
class _Current:
    """Policy that leaves every forward to the one whose turn it is."""

    current: _Probes | _Injection

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        return self.current.denoiser(sample, timestep, compute)

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        return self.current.block(index, streams, compute)


class _Probes:
    """Policy of a dense run that evaluates each call again under every single reuse."""

    def __init__(self, problem: SearchProblem, batch: Batch, repeat: Repeat, ages: int) -> None:
        self.graph, self.size, self.ages = problem.graph, len(batch), ages
        self.predictions: list[Tensors] = []
        self.grams: list[npt.NDArray[np.float64]] = []  # of calls from 1 on
        self.forwards, self.cost = 0, 0.0
        self._seed = problem.settings.seed
        self._repeat = repeat
        self._model = problem.model
        self._mixtures: dict[int, tuple[Tensors, Tensor]] = {}
        self._repeatable: list[Tensors] = []
        self._window: list[dict[int, Tensors]] = []  # what blocks of the last calls can give again
        self._guidance: Guidance | None = None
        self._probe: tuple[int, int] | None = None
        self._now: dict[int, Tensors] = {}
        costs = self.graph.costs()
        self._cost_after = [float(costs[n + 1 :].sum() + costs[0]) for n in range(len(costs))]

    def start_call(self, call: int) -> None:
        self._call = call
        if call == 0:
            self._hook = MethodHook(self._model.pipe.scheduler, "step", self._step)

    def _step(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Learn how the parts of a batch make up the guided prediction, which is linear in them."""
        first = self.predictions[0][0]
        if self._guidance is None and first is not None:
            guided = args[0] if args else kwargs["model_output"]
            self._guidance = learned_guidance(first, guided, self.size)
        return step(*args, **kwargs)

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        self._now, self._changes = {}, dict[int, Tensors]()
        dense = compute()
        self.forwards += 1
        self.cost += 1.0
        at = self._repeat.at(sample, timestep)
        self.predictions.append(dense)
        if self._call:
            changes = list(self._changed(dense, at, compute))
            self._note(changes)
        self._repeatable.append(at.repeatable(dense))
        self._window = [*self._window, self._changes][-self.ages :]
        return dense

    def _changed(
        self, dense: Tensors, at: Any, compute: Callable[[], Tensors]
    ) -> Iterator[tuple[int, int, Tensors]]:
        """Yield block, age, and what its reuse changes in the prediction."""
        changes, skip = self._changes, self.graph.skip_gate
        for age in range(1, min(self._call, self.ages) + 1):
            repeated = at.predictions(self._repeatable[-age])
            yield 0, age, _minus(repeated, dense)
            for n in range(1, self.graph.num_blocks):
                if n == skip:
                    yield n, age, _minus(repeated, dense)
                    continue
                self._probe = (n, age)
                yield n, age, _minus(compute(), dense)
                self.forwards += 1
                self.cost += self._cost_after[n] / self.graph.call_macs()
        self._probe, self._changes = None, changes

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        residual = self.graph.blocks[index].reuse is Reuse.RESIDUAL
        if self._probe is None:
            outputs = compute()
            self._now[index] = outputs
            again = _minus(outputs, streams) if residual else tuple(outputs)
            self._changes[index] = again
            return outputs
        n, age = self._probe
        if index < n:  # as in the dense call: nothing before it has changed
            return self._now[index]
        if index > n:
            return compute()
        cached = self._window[-age][index]
        return _plus(streams, cached) if residual else cached

    def _note(self, changes: list[tuple[int, int, Tensors]]) -> None:
        """Keep how the changes of this call lie to each other, and a mixture of them."""
        ages, width = self.ages, self.graph.num_blocks * self.ages
        vectors = torch.stack([self._guided(change) for _, _, change in changes])  # (m, B, n)
        gram = torch.einsum("ibn,jbn->ij", vectors.double(), vectors.double())
        gram /= vectors.shape[1] * vectors.shape[2]
        oldest = min(self._call, ages)
        place = {(n, age): i for i, (n, age, _) in enumerate(changes)}
        rows = [place[e // ages, min(e % ages + 1, oldest)] for e in range(width)]
        self.grams.append(gram.cpu().numpy()[np.ix_(rows, rows)])
        drawn = torch.Generator().manual_seed(self._seed * 1_000_003 + self._call)
        signs = torch.randint(2, (len(changes),), generator=drawn) * 2.0 - 1.0
        sizes = gram.diagonal().clamp_min(SMALLEST).sqrt().cpu()
        weights = (signs / sizes * sizes.median()).tolist()
        parts = [change for _, _, change in changes]
        self._mixtures[self._call] = (
            tuple(_mixed([part[i] for part in parts], weights) for i in range(len(parts[0]))),
            sum(w * v for w, v in zip(weights, vectors, strict=True)),
        )

    def mixture(self, call: int) -> tuple[Tensors, float]:
        """Return a change of a call's prediction, made of those of its reuses, and its square."""
        change, guided = self._mixtures[call]
        return change, guided.double().square().mean().item()

    def _guided(self, change: Tensors) -> Tensor:
        assert self._guidance is not None and change[0] is not None
        return self._guidance.of(change[0])


class _Injection:
    """Policy that repeats a dense run up to a call, changes its prediction, and goes on."""

    def __init__(self, predictions: list[Tensors], call: int, change: Tensors) -> None:
        self.predictions, self.changed, self.change = predictions, call, change
        self.forwards, self.cost = 0, 0.0

    def start_call(self, call: int) -> None:
        self._call = call

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        if self._call < self.changed:
            return self.predictions[self._call]
        if self._call == self.changed:
            return _plus(self.predictions[self._call], self.change)
        self.forwards += 1
        self.cost += 1.0
        return compute()

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        return compute()


def _mixed(parts: list[Tensor | None], weights: list[float]) -> Tensor | None:
    if parts[0] is None:
        return None
    return torch.stack(
        [w * part for w, part in zip(weights, parts, strict=True) if part is not None]
    ).sum(0)


def _minus(a: Tensors, b: Tensors) -> Tensors:
    pairs = zip(a, b, strict=True)
    return tuple(None if x is None or y is None else x - y for x, y in pairs)


def _plus(a: Tensors, b: Tensors) -> Tensors:
    pairs = zip(a, b, strict=True)
    return tuple(None if x is None or y is None else x + y for x, y in pairs)
