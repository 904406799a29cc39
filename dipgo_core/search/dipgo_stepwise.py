"""Gates learned call by call beside dense runs: gradients of one call, memory free of their number.

A search step is one dense run of the stock pipeline a batch. In it each call is computed a second
time under the gates as they are, and compared with what it gave; its gradient is taken at once. A
block that is reused reads what it gave in the dense run at the last call where the gates compute
it, or at the oldest of the last `staleness` calls, the only ones whose outputs are held.

L = sum_t w_t |guided(gated_t) - guided(dense_t)|^2 + alpha * sparsity, while above tau. The weights
(`propagation`) make a term the share of the result's variance that the call alone would cost.

Differs from the paper: errors of calls neither add up nor meet each other, so a run of skipped
calls is dearer than this says where they point the same way. Of `loss`, `consistency` is not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.graph import BlockGraph
from dipgo_core.hooks import install
from dipgo_core.losses import sparsity_loss
from dipgo_core.pruner import GateLogits
from dipgo_core.repeat import repeat_of
from dipgo_core.sampling import noise_scheduler, rollout
from dipgo_core.search.calibration import batch_of, check_problem
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.propagation import Propagation, loaded_propagation, measure_propagation
from dipgo_core.search.training import Training, all_gates, calls_to_search, gammas
from dipgo_core.structures import Tensors
from dipgo_core.supernet import SoftGates

#: Of one image: a forward, and a backward pass of twice that.
GATED_COST = 3


def search_gates_stepwise(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Train a logit a gate; yield after every update, the last time with the outcome.

    Raises:
        SearchDivergedError: a loss or gradient that is not finite, or gates that lead nowhere.
        SearchError: a state of another search.
    """
    check_problem(problem)
    num_calls = calls_to_search(problem)
    settings, model = problem.settings, problem.model
    gates = len(problem.graph.searched)
    net = GateLogits(num_calls, gates, start=settings.start, seed=settings.seed).to(model.device)
    descent = CallByCall(problem, num_calls)
    training = Training(problem, num_calls, net, descent)
    descent.measure()
    handle = install(model.denoiser, problem.graph, descent.policy)
    try:
        yield from training.run()
    finally:
        handle.remove()


class CallByCall:
    """Gradients of single calls, weighted by what their changes do to the result."""

    def __init__(self, problem: SearchProblem, num_calls: int) -> None:
        self.problem, self.num_calls = problem, num_calls
        self.policy = GatedBeside(problem.graph, problem.settings.staleness)
        self.gamma = gammas(problem)
        self._propagation: Propagation | None = None
        self._before = (0, 0.0)
        self._sample_forwards = 0.0

    def measure(self) -> None:
        """Measure the weights of the calls, unless they were loaded."""
        if self._propagation is None:
            self._propagation, *spent = measure_propagation(self.problem, self.num_calls)
            self._before = (int(spent[0]), spent[1])

    @property
    def spent(self) -> tuple[int, float]:
        (forwards, sample_forwards), policy = self._before, self.policy
        return forwards + policy.forwards, sample_forwards + self._sample_forwards

    def backward(
        self, batch: list[int], gates: Tensor, *, ratio: float, scale: float
    ) -> tuple[float, float, float]:
        """Differentiate call by call beside one dense run, then the sparsity term."""
        problem, policy = self.problem, self.policy
        loss, rows = problem.settings.loss, all_gates(gates, problem.graph)
        assert self._propagation is not None
        gated = policy.start(rows.detach(), self._repeat(), self._propagation, scale)
        with torch.no_grad():
            on_call = policy.start_call
            rollout(problem.model, batch_of(problem, batch), problem.sampler, on_call=on_call)
        self._sample_forwards += len(batch) * (self.num_calls + GATED_COST * gated)
        sparsity = sparsity_loss(gates, self.gamma)
        pull = loss.alpha if ratio > loss.tau else 0.0
        torch.autograd.backward([rows, pull * scale * sparsity], [policy.gradient, None])
        total = policy.loss + pull * sparsity.item()
        return total, policy.loss, sparsity.item()

    def _repeat(self) -> Any:
        return repeat_of(noise_scheduler(self.problem.model, self.problem.sampler))

    def to_tensors(self) -> dict[str, Tensor]:
        assert self._propagation is not None
        return self._propagation.to_tensors()

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._propagation = loaded_propagation(state, self.problem.model.device)


class GatedBeside:
    """Policy of a dense run that computes each call again under its gates, and differentiates it.

    loss: sum of the calls' terms of a run. gradient: (T, N), of the gates, times the run's scale.
    """

    def __init__(self, graph: BlockGraph, staleness: int) -> None:
        self.forwards = 0
        self.loss = 0.0
        self.window: list[Mapping[int, Tensors]] = []  # what blocks gave in the calls before
        self._graph, self._staleness = graph, staleness
        self._dense = SoftGates(graph, checkpointing=False)
        self._gated = SoftGates(graph, checkpointing=False)
        self._turn = self._dense

    def start(self, gates: Tensor, repeat: Any, propagation: Propagation, scale: float) -> int:
        """Begin a run; return how many of its calls are computed again. gates: (T, N), 0 or 1.

        Where a call's gates are all kept it is what it was, and the gradient is exactly 0.
        """
        self._gates, self._repeat, self._scale = gates, repeat, scale
        self._propagation = propagation
        self.gradient = torch.zeros_like(gates)
        self.loss, self.window = 0.0, []
        keep = (gates >= 0.5).cpu().numpy()
        self._computed_at = last_computed(keep, self._graph)
        self._differs: npt.NDArray[np.bool_] = ~np.array([row.all() for row in keep])
        return int(self._differs[1:].sum())

    def start_call(self, call: int) -> None:
        self._call = call

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        """Give what the dense model gives; learn from the gated call beside it."""
        self._turn = self._dense
        self._dense.start(torch.ones_like(self._gates[:1]), self._repeat)
        dense = self._dense.denoiser(sample, timestep, compute)
        self.forwards += 1
        if self._call and self._differs[self._call]:
            self._turn = self._gated
            self._learn(sample, timestep, compute, dense)
            self.forwards += 1
        self.window = [*self.window, self._dense.cache][-self._staleness :]
        return dense

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        return self._turn.block(index, streams, compute)

    def _learn(
        self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors], dense: Tensors
    ) -> None:
        row = self._gates[self._call].clone().requires_grad_()
        with torch.enable_grad():
            self._gated.start(row[None], self._repeat, self._stale())
            gated = self._gated.denoiser(sample, timestep, compute)
            assert gated[0] is not None and dense[0] is not None
            change = self._propagation.guidance.of(gated[0].float() - dense[0].float())
            loss = float(self._propagation.weights[self._call]) * change.square().mean()
            (loss * self._scale).backward()  # type: ignore[no-untyped-call]
        self.loss += loss.item()
        if row.grad is not None:
            self.gradient[self._call] = row.grad
        self._gated.start(row.detach()[None], self._repeat)  # lets go of the call's tensors

    def _stale(self) -> dict[int, Tensors]:
        """Return what each block reads if it is reused now: an output of the dense run."""
        ages = self._call - self._computed_at[self._call]
        return {n: self.window[-min(int(ages[n]), len(self.window))][n] for n in self.window[-1]}


def last_computed(keep: npt.NDArray[np.bool_], graph: BlockGraph) -> npt.NDArray[np.int64]:
    """Return the last call before each call at which each block is computed.  # (T, N)

    Column 0: at which the call is not skipped. keep: (T, N), row 0 all kept.
    """
    found = np.zeros(keep.shape, dtype=np.int64)
    for call in range(1, len(keep)):
        live = graph.live(keep[call - 1])
        found[call] = np.where(live, call - 1, found[call - 1])
    return found
