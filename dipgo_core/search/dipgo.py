"""The paper's search: PrunerNet trained through the whole denoising chain (arXiv 2410.16942, 3).

Plain SGD without momentum, warm-up, cosine to zero. Items of a search step are drawn from the seed
and the step alone, so a resumed search continues to the same result.

Faithful to the paper, and known to be weak: while everything is kept the consistency gradient is
zero, so gamma alone decides the first flips.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.config import SearchSettings
from dipgo_core.errors import SearchError
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.losses import Loss, total_loss
from dipgo_core.memory import checkpoints
from dipgo_core.outcome import SearchOutcome
from dipgo_core.pruner import PrunerNet, straight_through
from dipgo_core.sampling import decode, noise_scheduler
from dipgo_core.search.calibration import (
    batch_of,
    check_problem,
    dense_latents,
    draw_items,
)
from dipgo_core.search.progress import NOTHING_YET, Figures, SearchProblem, SearchProgress
from dipgo_core.supernet import SuperNet

#: In float16, gradients of an image loss fall below the smallest number; a power of two is exact.
HALF_LOSS_SCALE = 4096.0
#: A gate that was dead for this last share of the search has no score of its own.
DEAD_SHARE = 0.5


def search_gates(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Train the pruner; yield after every update, the last time with the outcome.

    Raises:
        SearchError: a loss or gradient that is not finite, or a state of another search.
    """
    search = _Search(problem)
    if search.done == problem.settings.steps:  # interrupted between its last step and its record
        yield search.progress()
    with search.supernet:
        while search.done < problem.settings.steps:
            search.advance()
            yield search.progress()


class _Search:
    """Pruner, optimiser and counters of one search."""

    def __init__(self, problem: SearchProblem) -> None:
        check_problem(problem)
        settings, model, graph = problem.settings, problem.model, problem.graph
        self.problem = problem
        self.num_calls = len(noise_scheduler(model, problem.sampler).timesteps)
        if self.num_calls < 2:
            raise SearchError("a search needs at least 2 denoiser calls, the sampler makes 1")
        self.full, self.forwards_before = dense_latents(problem)
        self.net = PrunerNet(
            self.num_calls,
            len(graph.searched),
            query_dim=settings.query_dim,
            encoder=settings.encoder,
            seed=settings.seed,
        ).to(model.device)
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=0.0, weight_decay=settings.weight_decay
        )
        shares = graph.savings()[list(graph.searched)] if settings.loss.gamma else 1.0
        self.gamma = torch.ones(len(graph.searched), device=model.device) * torch.as_tensor(
            shares, dtype=torch.float32, device=model.device
        )
        self.loss_scale = HALF_LOSS_SCALE if model.dtype is torch.float16 else 1.0
        again = problem.checkpoint_calls
        if again is None:
            again = checkpoints(graph.call_macs(), self.num_calls * settings.batch_size)
        self.supernet = SuperNet(model, graph, checkpointing=again)
        # of one image: forward, backward twice that, and once more where calls are repeated
        self.step_cost = self.num_calls * (4 if again else 3)
        self.done, self.seconds = 0, 0.0
        self.sample_forwards = float(self.forwards_before * settings.batch_size)
        self.last_needed = np.zeros((self.num_calls, len(graph.searched)), dtype=np.int64)
        self.figures = NOTHING_YET
        if problem.resume is not None:
            self._load(problem.resume)

    def advance(self) -> None:
        """Make one update of the pruner."""
        started, settings = time.perf_counter(), self.problem.settings
        rate = learning_rate(self.done, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        keep = self._keep()
        ratio = self._compute_ratio(keep)
        self.optimizer.zero_grad()
        parts = self._drawn()
        share = 1 / len(parts)  # equal parts: the mean of their gradients is that of the batches
        losses = torch.tensor([self._backward(part, ratio, share) for part in parts]).mean(dim=0)
        total, consistency, sparsity = losses.tolist()
        for parameter in self.net.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.loss_scale
        self._refuse_non_finite(total)
        self.optimizer.step()
        self.done += 1
        self.sample_forwards += self.step_cost * sum(map(len, parts))
        self._note_needed(keep)
        flips = int((keep != self._keep()).sum())
        self.figures = Figures(total, consistency, sparsity, ratio, rate, int(keep.sum()), flips)
        self.seconds += time.perf_counter() - started

    def progress(self) -> SearchProgress:
        """Return the record of the last update."""
        num_steps = self.problem.settings.steps
        return SearchProgress(
            search_step=self.done,
            num_steps=num_steps,
            **self.figures._asdict(),
            forwards=self.forwards_before + self.supernet.forwards,
            sample_forwards=self.sample_forwards,
            seconds=self.seconds,
            outcome=self._outcome() if self.done == num_steps else None,
            snapshot=self._state,
        )

    def _drawn(self) -> list[list[int]]:
        """Return the items of this step, as many at a time as the problem says."""
        problem, size = self.problem, self.problem.images_at_once
        batches = draw_items(problem.settings, self.done, len(problem.items))
        size = size or problem.settings.batch_size
        return [batch[i : i + size] for batch in batches for i in range(0, len(batch), size)]

    def _backward(self, batch: list[int], ratio: float, share: float) -> tuple[float, float, float]:
        """Add its share of the gradient of some items; return total, consistency and sparsity."""
        problem = self.problem
        model, sampler, settings = problem.model, problem.sampler, problem.settings
        with torch.no_grad():
            full = decode(model, self.full[batch].to(model.device))
        gates = straight_through(self.net())  # (T, S)
        final = self.supernet.rollout(
            batch_of(problem, batch), sampler, all_gates(gates, problem.graph)
        )
        loss: Loss = total_loss(
            decode(model, final),
            full,
            gates,
            self.gamma,
            compute_ratio=ratio,
            settings=settings.loss,
        )
        (loss.total * (self.loss_scale * share)).backward()  # type: ignore[no-untyped-call]
        return loss.total.item(), loss.consistency.item(), loss.sparsity.item()

    def _keep(self) -> npt.NDArray[np.bool_]:
        """Return the searched gates as they are now.  # (T, S)"""
        with torch.no_grad():
            keep: npt.NDArray[np.bool_] = (self.net() >= 0.5).cpu().numpy()
        return keep

    def _rows(self, keep: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        rows = np.ones((self.num_calls, self.problem.graph.num_blocks), dtype=np.bool_)
        rows[:, self.problem.graph.searched] = keep
        return rows

    def _compute_ratio(self, keep: npt.NDArray[np.bool_]) -> float:
        return 1 - self.problem.graph.pruned_ratio(GateTable(self._rows(keep)))

    def _note_needed(self, keep: npt.NDArray[np.bool_]) -> None:
        graph = self.problem.graph
        needed = np.stack([needed_gates(row, graph) for row in self._rows(keep)])
        self.last_needed[needed[:, graph.searched]] = self.done

    def _refuse_non_finite(self, loss: float) -> None:
        gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
        if not math.isfinite(loss) or not all(bool(g.isfinite().all()) for g in gradients):
            raise SearchError(
                f"search step {self.done + 1} of {self.problem.settings.steps}: the loss "
                f"({loss}) or its gradient is not finite. Lower search.learning_rate, or set "
                f"the model's dtype to float32 (it is {self.problem.model.settings.dtype})"
            )

    def _outcome(self) -> SearchOutcome:
        with torch.no_grad():
            p_keep = self.net().double().cpu().numpy()
        settings, graph = self.problem.settings, self.problem.graph
        return SearchOutcome(
            scores=final_scores(p_keep, self.last_needed, settings.steps, graph),
            forwards=self.forwards_before + self.supernet.forwards,
            sample_forwards=self.sample_forwards,
        )

    def _state(self) -> dict[str, Tensor]:
        """Everything that decides the rest: SGD without momentum has no state of its own."""
        weights = {f"pruner.{k}": v.detach().cpu().clone() for k, v in self._weights().items()}
        counters = {
            "search_step": torch.tensor(self.done),
            "forwards": torch.tensor(self.forwards_before + self.supernet.forwards),
            "sample_forwards": torch.tensor(self.sample_forwards, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "last_needed": torch.from_numpy(self.last_needed.copy()),
            "figures": self.figures.to_tensor(),
        }
        return {**weights, **counters}

    def _weights(self) -> dict[str, Tensor]:
        return dict(self.net.state_dict())

    def _load(self, state: Mapping[str, Tensor]) -> None:
        try:
            self.net.load_state_dict({k: state[f"pruner.{k}"] for k in self._weights()})
            self.done = int(state["search_step"])
            self.forwards_before = int(state["forwards"])
            self.sample_forwards = float(state["sample_forwards"])
            self.seconds = float(state["seconds"])
            self.last_needed = state["last_needed"].numpy().copy()
            self.figures = Figures.from_tensor(state["figures"])
        except (KeyError, RuntimeError) as error:
            raise SearchError(
                f"the saved state belongs to another search ({error}); delete it and start anew"
            ) from error


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


def final_scores(
    p_keep: npt.NDArray[np.float64],
    last_needed: npt.NDArray[np.int64],
    num_steps: int,
    graph: BlockGraph,
) -> npt.NDArray[np.float64]:
    """Return scores of all gates from p_keep of the searched ones.  # (T, S) -> (T, N)

    last_needed: (T, S), the last search step at which the gate decided anything. A gate that was
    dead throughout the last half was pushed by sparsity alone: its score says nothing, and it
    takes the score of the gate that killed it. A skip gate that a block implies takes the score
    of that block in the same way.
    """
    scores = np.zeros((len(p_keep), graph.num_blocks))
    known = np.zeros(scores.shape, dtype=np.bool_)
    scores[:, graph.searched] = p_keep
    known[:, graph.searched] = last_needed >= (1 - DEAD_SHARE) * num_steps
    for row, own in zip(scores[1:], known[1:], strict=True):
        row[~own] = _needed_up_to(np.where(own, row, np.inf), graph)[~own]
    scores[0] = 1.0
    return scores


def _needed_up_to(row: npt.NDArray[np.float64], graph: BlockGraph) -> npt.NDArray[np.float64]:
    """Return the highest threshold at which each gate would decide something.  # (N,)"""
    reach = np.zeros(graph.num_blocks)
    for threshold in np.unique(row[np.isfinite(row)]):
        kept = row >= threshold
        kept[0] |= 0 not in graph.searched
        reach[needed_gates(kept, graph)] = threshold
    return reach


def needed_gates(row: npt.NDArray[np.bool_], graph: BlockGraph) -> npt.NDArray[np.bool_]:
    """Return which gates decide something: they would be live if kept.  # (N,)"""
    needed = np.zeros(graph.num_blocks, dtype=np.bool_)
    for n in range(graph.num_blocks):
        kept = row.copy()
        kept[n] = True
        needed[n] = graph.live(kept)[n]
    return needed
