"""Training of gates by gradient, whatever the gradient is of: what `dipgo` and its kin share.

Plain SGD without momentum, warm-up, cosine to zero. Items and noise of a search step are drawn from
the seed and the step alone, so a resumed search continues to the same result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dipgo_core.config import SearchSettings
from dipgo_core.errors import SearchDivergedError, SearchError
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.outcome import SearchOutcome
from dipgo_core.pruner import sampled, straight_through
from dipgo_core.sampling import noise_scheduler
from dipgo_core.search.calibration import draw_items
from dipgo_core.search.progress import NOTHING_YET, Figures, SearchProblem, SearchProgress
from dipgo_core.search.scores import final_scores, needed_gates
from dipgo_core.search.stops import Watch

#: In float16, gradients of an image loss fall below the smallest number; a power of two is exact.
HALF_LOSS_SCALE = 4096.0

Keep = npt.NDArray[np.bool_]


class Descent(Protocol):
    """How a strategy differentiates its loss."""

    @property
    def spent(self) -> tuple[int, float]:
        """Forwards and sample forwards so far (`SearchOutcome`)."""

    def backward(
        self, batch: list[int], gates: Tensor, *, ratio: float, scale: float
    ) -> tuple[float, float, float]:
        """Add `scale` times the gradient of some items; return total, consistency and sparsity.

        gates: (T, S), 0 or 1, differentiable. ratio: kept share of the dense MACs.
        """

    def to_tensors(self) -> dict[str, Tensor]:
        """Return what was measured once and decides the rest."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take that over from an interrupted search."""


class Training:
    """Gates, optimiser and counters of one search. net: gives p_keep (T, S)."""

    def __init__(
        self, problem: SearchProblem, num_calls: int, net: nn.Module, descent: Descent
    ) -> None:
        settings, graph = problem.settings, problem.graph
        self.problem, self.num_calls, self.net, self.descent = problem, num_calls, net, descent
        self.optimizer = torch.optim.SGD(
            net.parameters(), lr=0.0, weight_decay=settings.weight_decay
        )
        self.loss_scale = HALF_LOSS_SCALE if problem.model.dtype is torch.float16 else 1.0
        self.done, self.seconds = 0, 0.0
        self.spent_before = (0, 0.0)
        self.last_needed = np.zeros((num_calls, len(graph.searched)), dtype=np.int64)
        self.figures = NOTHING_YET
        self.watch = Watch(settings, self._p_keep())
        if problem.resume is not None:
            self._load(problem.resume)

    def run(self) -> Iterator[SearchProgress]:
        """Train; yield after every update, the last time with the outcome.

        Raises:
            SearchDivergedError: a loss or gradient that is not finite, or gates that lead nowhere.
        """
        if self.done == self.problem.settings.steps:  # interrupted before its record was written
            yield self.progress()
        while self.done < self.problem.settings.steps:
            self.advance()
            yield self.progress()

    def advance(self) -> None:
        """Make one update of the gates."""
        started, settings = time.perf_counter(), self.problem.settings
        rate = learning_rate(self.done, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        noise = draw_noise(self.done, settings, self.last_needed[1:].shape)
        with torch.no_grad():
            before = self.net()
            keep = (self._drawn_from(before, noise) >= 0.5).cpu().numpy()
        ratio = self._compute_ratio(keep)
        self.optimizer.zero_grad()
        parts = self._drawn()
        share = 1 / len(parts)  # equal parts: the mean of their gradients is that of the batches
        losses = torch.tensor([self._backward(part, noise, ratio, share) for part in parts])
        total, consistency, sparsity = losses.mean(dim=0).tolist()
        self._refuse_non_finite(total)
        self.optimizer.step()
        self.done += 1
        self._note_needed(keep)
        p_keep = self._p_keep()
        flips = int(((p_keep >= 0.5) != (before.cpu().numpy() >= 0.5)).sum())
        self.figures = Figures(total, consistency, sparsity, ratio, rate, int(keep.sum()), flips)
        self.seconds += time.perf_counter() - started
        if reason := self.watch.note(self.done, keep, p_keep, self.last_needed):
            raise self._diverged(self.done, reason)

    def progress(self) -> SearchProgress:
        """Return the record of the last update."""
        num_steps = self.problem.settings.steps
        forwards, sample_forwards = self._spent()
        last = self.done == num_steps
        return SearchProgress(
            search_step=self.done,
            num_steps=num_steps,
            **self.figures._asdict(),
            forwards=forwards,
            sample_forwards=sample_forwards,
            seconds=self.seconds,
            outcome=self._outcome(self._p_keep(), self.last_needed, num_steps) if last else None,
            snapshot=self._state,
        )

    def _spent(self) -> tuple[int, float]:
        (forwards, sample), (more, more_sample) = self.spent_before, self.descent.spent
        return forwards + more, sample + more_sample

    def _drawn(self) -> list[list[int]]:
        """Return the items of this step, as many at a time as the problem says."""
        problem, size = self.problem, self.problem.images_at_once
        batches = draw_items(problem.settings, self.done, len(problem.items))
        size = size or problem.settings.batch_size
        return [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]

    def _backward(
        self, batch: list[int], noise: Tensor | None, ratio: float, share: float
    ) -> tuple[float, float, float]:
        gates = straight_through(self._drawn_from(self.net(), noise))  # (T, S)
        scale = self.loss_scale * share
        return self.descent.backward(batch, gates, ratio=ratio, scale=scale)

    def _drawn_from(self, p_keep: Tensor, noise: Tensor | None) -> Tensor:
        return p_keep if noise is None else sampled(p_keep, noise.to(p_keep))

    def _p_keep(self) -> npt.NDArray[np.float64]:
        """Return the probabilities of the searched gates as they are now.  # (T, S)"""
        with torch.no_grad():
            p_keep: npt.NDArray[np.float64] = self.net().double().cpu().numpy()
        return p_keep

    def _rows(self, keep: Keep) -> Keep:
        rows = np.ones((self.num_calls, self.problem.graph.num_blocks), dtype=np.bool_)
        rows[:, self.problem.graph.searched] = keep
        return rows

    def _compute_ratio(self, keep: Keep) -> float:
        return 1 - self.problem.graph.pruned_ratio(GateTable(self._rows(keep)))

    def _note_needed(self, keep: Keep) -> None:
        graph = self.problem.graph
        needed = np.stack([needed_gates(row, graph) for row in self._rows(keep)])
        self.last_needed[needed[:, graph.searched]] = self.done

    def _refuse_non_finite(self, loss: float) -> None:
        """Take the scale out of the gradients; raise unless they and the loss are finite."""
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        for gradient in gradients:
            gradient /= self.loss_scale
        if not math.isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients):
            raise self._diverged(
                self.done + 1,
                f"the loss ({loss}) or its gradient is not finite. Lower search.learning_rate, or "
                f"set the model's dtype to float32 (it is {self.problem.model.settings.dtype})",
            )

    def _diverged(self, search_step: int, reason: str) -> SearchDivergedError:
        """Return the error, with scores of the last good step as they serve every target."""
        good, steps = self.watch.good, self.problem.settings.steps
        outcome, told = None, "no step before it had gates worth keeping"
        if good is not None:
            outcome = self._outcome(good.p_keep, good.last_needed, good.search_step)
            told = f"the gates of step {good.search_step} are the last good ones"
        message = f"search step {search_step} of {steps}: {reason}; {told}"
        return SearchDivergedError(message, outcome)

    def _outcome(
        self, p_keep: npt.NDArray[np.float64], last_needed: npt.NDArray[np.int64], num_steps: int
    ) -> SearchOutcome:
        forwards, sample_forwards = self._spent()
        return SearchOutcome(
            scores=final_scores(p_keep, last_needed, num_steps, self.problem.graph),
            forwards=forwards,
            sample_forwards=sample_forwards,
        )

    def _state(self) -> dict[str, Tensor]:
        """Everything that decides the rest: SGD without momentum has no state of its own."""
        weights = {k: v.detach().cpu().clone() for k, v in self.net.state_dict().items()}
        forwards, sample_forwards = self._spent()
        counters = {
            "search_step": torch.tensor(self.done),
            "forwards": torch.tensor(forwards),
            "sample_forwards": torch.tensor(sample_forwards, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "last_needed": torch.from_numpy(self.last_needed.copy()),
            "figures": self.figures.to_tensor(),
        }
        return {
            **_prefixed("pruner", weights),
            **_prefixed("watch", self.watch.to_tensors()),
            **_prefixed("descent", self.descent.to_tensors()),
            **counters,
        }

    def _load(self, state: Mapping[str, Tensor]) -> None:
        try:
            self.net.load_state_dict(_of_prefix("pruner", state))
            self.watch.load(_of_prefix("watch", state))
            self.descent.load(_of_prefix("descent", state))
            self.done = int(state["search_step"])
            forwards, sample_forwards = self.descent.spent  # what was made again costs nothing
            self.spent_before = (
                int(state["forwards"]) - forwards,
                float(state["sample_forwards"]) - sample_forwards,
            )
            self.seconds = float(state["seconds"])
            self.last_needed = state["last_needed"].numpy().copy()
            self.figures = Figures.from_tensor(state["figures"])
        except (KeyError, RuntimeError) as error:
            raise SearchError(
                f"the saved state belongs to another search ({error}); delete it and start anew"
            ) from error


def _prefixed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": value for key, value in tensors.items()}


def _of_prefix(name: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{name}."
    return {k.removeprefix(start): v for k, v in state.items() if k.startswith(start)}


def calls_to_search(problem: SearchProblem) -> int:
    """Return the number of denoiser calls; raise SearchError if there is no gate to decide."""
    num_calls = len(noise_scheduler(problem.model, problem.sampler).timesteps)
    if num_calls < 2:
        raise SearchError("a search needs at least 2 denoiser calls, the sampler makes 1")
    return num_calls


def gammas(problem: SearchProblem) -> Tensor:
    """Return the weights of the searched gates in the sparsity term.  # (S,)"""
    graph, device = problem.graph, problem.model.device
    shares = graph.savings()[list(graph.searched)]
    weights = shares if problem.settings.loss.gamma else np.ones(len(graph.searched))
    return torch.as_tensor(weights, dtype=torch.float32, device=device)


def all_gates(gates: Tensor, graph: BlockGraph) -> Tensor:
    """Return gates of all blocks: an implied skip gate is kept.  # (T, S) -> (T, N)"""
    columns = torch.tensor(graph.searched, device=gates.device)
    return gates.new_ones(len(gates), graph.num_blocks).index_copy(1, columns, gates)


def learning_rate(search_step: int, settings: SearchSettings) -> float:
    """Return the rate of a step counted from 0: linear from 0, then half a cosine to 0."""
    if search_step < settings.warmup_steps:
        return settings.learning_rate * search_step / settings.warmup_steps
    length = max(1, settings.steps - settings.warmup_steps)
    phase = (search_step - settings.warmup_steps) / length
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * phase))


def draw_noise(search_step: int, settings: SearchSettings, shape: tuple[int, ...]) -> Tensor | None:
    """Return the logistic noise of a step's gates, from seed and step alone; None unsampled."""
    if settings.sampling == "none":
        return None
    generator = np.random.default_rng([settings.seed, search_step, 1])
    return torch.from_numpy(generator.logistic(size=shape))
