"""What every search strategy takes and yields: one problem in, one record of progress a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dipgo_core.config import Convention, SamplerSettings, SearchSettings
from dipgo_core.graph import BlockGraph
from dipgo_core.items import Item
from dipgo_core.outcome import SearchOutcome
from dipgo_core.pipelines import LoadedModel


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchProblem:
    """Everything that decides a search.

    items, seeds: the calibration split, one seed an item. dense_latents: (n, C, h, w), final
    latents of the dense model for them, or None to compute them first. resume: what
    ``SearchProgress.state`` gave, to go on from there.

    What only decides the memory it takes: images_at_once, a divisor of the batch's size, whose
    gradients are averaged (None: the batch whole); checkpoint_calls: whether denoiser calls are
    computed again in the backward pass (None: where their MACs are many).
    """

    model: LoadedModel
    graph: BlockGraph
    sampler: SamplerSettings
    settings: SearchSettings
    items: tuple[Item, ...]
    seeds: tuple[int, ...]
    dense_latents: Tensor | None = None
    resume: Mapping[str, Tensor] | None = None
    images_at_once: int | None = None
    checkpoint_calls: bool | None = None
    targets: tuple[float, ...] = ()
    convention: Convention = "all"
    step_masks: Mapping[int, tuple[int, ...]] | None = None
    errors: Mapping[str, Tensor] | None = None


class Figures(NamedTuple):
    """What one search step measured, with the gates it was computed with.

    compute_ratio: kept share of the dense MACs, closure included. kept_gates: searched gates kept,
    before closure. flips: gates changed by the step.
    """

    loss: float
    consistency: float
    sparsity: float
    compute_ratio: float
    learning_rate: float
    kept_gates: int
    flips: int

    def to_tensor(self) -> Tensor:
        return torch.tensor(self, dtype=torch.float64)

    @classmethod
    def from_tensor(cls, values: Tensor) -> Figures:
        loss, consistency, sparsity, ratio, rate, kept_gates, flips = values.tolist()
        return cls(loss, consistency, sparsity, ratio, rate, int(kept_gates), int(flips))


NOTHING_YET = Figures(0.0, 0.0, 0.0, 1.0, 0.0, 0, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class SearchProgress:
    """One search step, counted from 1; see `Figures`.

    forwards, sample_forwards, seconds: spent so far, over all interruptions (`SearchOutcome`).
    outcome: with the last step only.
    """

    search_step: int
    num_steps: int
    loss: float
    consistency: float
    sparsity: float
    compute_ratio: float
    learning_rate: float
    kept_gates: int
    flips: int
    forwards: int
    sample_forwards: float
    seconds: float
    outcome: SearchOutcome | None = None
    snapshot: Callable[[], dict[str, Tensor]] = field(repr=False)

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed search needs; ask before the next step. Fit for safetensors."""
        return self.snapshot()

    def to_json(self) -> dict[str, Any]:
        """Return the figures of the loss curve."""
        left_out = ("outcome", "snapshot")
        return {k: v for k, v in vars(self).items() if k not in left_out}


Strategy = Callable[[SearchProblem], Iterator[SearchProgress]]
