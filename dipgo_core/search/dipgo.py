"""The paper's search: PrunerNet trained through the whole denoising chain (arXiv 2410.16942, 3).

Faithful to the paper, and known to be weak: while everything is kept the consistency gradient is
zero, so gamma alone decides the first flips. `start` and `sampling` of the settings are remedies.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dipgo_core.losses import Loss, total_loss
from dipgo_core.memory import checkpoints
from dipgo_core.pruner import PrunerNet
from dipgo_core.sampling import decode
from dipgo_core.search.calibration import batch_of, check_problem, dense_latents
from dipgo_core.search.progress import SearchProblem, SearchProgress
from dipgo_core.search.training import Training, all_gates, calls_to_search, gammas
from dipgo_core.supernet import SuperNet


def search_gates(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Train the pruner; yield after every update, the last time with the outcome.

    Raises:
        SearchDivergedError: a loss or gradient that is not finite, or gates that lead nowhere.
        SearchError: a state of another search.
    """
    check_problem(problem)
    num_calls = calls_to_search(problem)
    settings = problem.settings
    net = PrunerNet(
        num_calls,
        len(problem.graph.searched),
        query_dim=settings.query_dim,
        encoder=settings.encoder,
        start=settings.start,
        seed=settings.seed,
    ).to(problem.model.device)
    descent = _WholeChain(problem, num_calls)
    training = Training(problem, num_calls, net, descent)
    with descent.supernet:
        yield from training.run()


class _WholeChain:
    """Gradients through all calls and the decoder."""

    def __init__(self, problem: SearchProblem, num_calls: int) -> None:
        self.problem = problem
        self.full, self.dense_forwards = dense_latents(problem)
        self.gamma = gammas(problem)
        size = problem.settings.batch_size
        again = problem.checkpoint_calls
        if again is None:
            again = checkpoints(problem.graph.call_macs(), num_calls * size)
        self.supernet = SuperNet(problem.model, problem.graph, checkpointing=again)
        # of one image: forward, backward twice that, and once more where calls are repeated
        self._image_cost = num_calls * (4 if again else 3)
        self._sample_forwards = float(self.dense_forwards * size)

    @property
    def spent(self) -> tuple[int, float]:
        return self.dense_forwards + self.supernet.forwards, self._sample_forwards

    def backward(
        self, batch: list[int], gates: Tensor, *, ratio: float, scale: float
    ) -> tuple[float, float, float]:
        """Differentiate the distance of decoded images, and the sparsity term."""
        problem = self.problem
        model, settings = problem.model, problem.settings
        with torch.no_grad():
            full = decode(model, self.full[batch].to(model.device))
        final = self.supernet.rollout(
            batch_of(problem, batch), problem.sampler, all_gates(gates, problem.graph)
        )
        loss: Loss = total_loss(
            decode(model, final),
            full,
            gates,
            self.gamma,
            compute_ratio=ratio,
            settings=settings.loss,
        )
        (loss.total * scale).backward()  # type: ignore[no-untyped-call]
        self._sample_forwards += self._image_cost * len(batch)
        return loss.total.item(), loss.consistency.item(), loss.sparsity.item()

    def to_tensors(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Nothing was measured."""
