"""Which calls to compute when calls are computed whole or skipped: the bar a search must pass.

One mask for every number of computed calls: the one whose final latents are nearest to the dense
model's on calibration items. Exhaustive at few calls, else greedy with exchanges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Final

import torch
from torch import Tensor

from dipgo_core.errors import SearchError
from dipgo_core.graph import INPUT
from dipgo_core.hooks import install
from dipgo_core.outcome import SearchOutcome
from dipgo_core.repeat import Repeat, repeat_of
from dipgo_core.sampling import noise_scheduler, rollout
from dipgo_core.search.calibration import (
    batch_of,
    check_problem,
    dense_latents,
    draw_items,
)
from dipgo_core.search.progress import NOTHING_YET, Figures, SearchProblem, SearchProgress
from dipgo_core.strategies import EXHAUSTIVE_CALLS
from dipgo_core.structures import Tensors

#: Progress is reported after this many shares of the masks.
REPORTS: Final = 32

Mask = tuple[bool, ...]


def search_step_masks(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Find the best mask for every number of computed calls; items: one batch drawn by the seed.

    `loss` and `consistency` are the mean, over numbers of calls seen so far, of the best latent
    MSE; `kept_gates` and `compute_ratio` are those of the mask tried last. A resumed search ends
    with the same masks, at some more forwards.

    Raises:
        SearchError: latents that are not finite, or a state of another search.
    """
    search = _MaskSearch(problem)
    if search.done == search.num_steps:  # interrupted between its last step and its record
        yield search.progress()
    with search.calls.installed(problem):
        yield from search.exhaustive() if search.num_calls <= EXHAUSTIVE_CALLS else search.greedy()


@dataclass(frozen=True)
class _Known:
    """What a call gave, and what a call that is skipped after it gives again."""

    prediction: Tensors
    repeatable: Tensors


class _MaskedCalls:
    """Policy that computes the calls of a mask, and repeats what is known already."""

    def __init__(self, repeat: Repeat) -> None:
        self._repeat = repeat
        self.computed = 0

    @contextmanager
    def installed(self, problem: SearchProblem) -> Iterator[None]:
        graph, denoiser = problem.graph, problem.model.denoiser
        whole = replace(graph, blocks=graph.blocks[:1], producers=((INPUT,),))
        handle = install(denoiser, whole, self)
        try:
            yield
        finally:
            handle.remove()

    def start(self, mask: Mask, known: list[_Known]) -> None:
        """Begin a run; `known` grows by what its calls give."""
        self._mask, self._known = mask, known

    def start_call(self, call: int) -> None:
        self._call = call

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        if self._call == len(self._known):
            at = self._repeat.at(sample, timestep)
            if self._mask[self._call]:
                self.computed += 1
                now = compute()
                self._known.append(_Known(now, at.repeatable(now)))
            else:
                before = self._known[-1].repeatable
                self._known.append(_Known(at.predictions(before), before))
        return self._known[self._call].prediction

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        return compute()


class _MaskSearch:
    """The best masks so far, and the predictions of the mask tried last."""

    def __init__(self, problem: SearchProblem) -> None:
        check_problem(problem)
        self.problem = problem
        scheduler = noise_scheduler(problem.model, problem.sampler)
        self.num_calls = len(scheduler.timesteps)
        chosen = draw_items(problem.settings, 0, len(problem.items))[0]
        full, self.forwards = dense_latents(problem)
        self.full = full[chosen].to(problem.model.device)
        self.batch = batch_of(problem, chosen)
        self.sample_forwards = float(self.forwards * problem.settings.batch_size)
        self.calls = _MaskedCalls(repeat_of(scheduler))
        self.best: dict[int, tuple[float, Mask]] = {}
        self.seen: tuple[Mask, list[_Known]] = ((), [])
        self.done, self.seconds, self.figures = 0, 0.0, NOTHING_YET
        if problem.resume is not None:
            self._load(problem.resume)

    @property
    def num_steps(self) -> int:
        exhaustive = self.num_calls <= EXHAUSTIVE_CALLS
        return min(REPORTS, 2 ** (self.num_calls - 1)) if exhaustive else self.num_calls

    def exhaustive(self) -> Iterator[SearchProgress]:
        """Try all masks; neighbours in binary order share prefixes, so each costs one forward."""
        free = self.num_calls - 1
        share = 2**free // self.num_steps
        while self.done < self.num_steps:
            numbers = range(self.done * share, (self.done + 1) * share)
            yield self._try(
                [(True, *(bool(n >> (free - 1 - i) & 1) for i in range(free))) for n in numbers]
            )

    def greedy(self) -> Iterator[SearchProgress]:
        """Add the call that helps most, then move computed calls to free neighbours while it helps.

        Not exact: the mask of k calls grows out of the one of k - 1.
        """
        while self.done < self.num_steps:
            if self.done == 0:
                masks = [tuple(call == 0 for call in range(self.num_calls))]
            else:
                base = self.best[self.done][1]
                masks = [_flip(base, call) for call, computed in enumerate(base) if not computed]
            yield self._try(masks, exchange=True)

    def _try(self, masks: list[Mask], exchange: bool = False) -> SearchProgress:
        started, before = time.perf_counter(), dict(self.best)
        for mask in masks:
            self._note(mask)
        if exchange:
            self._exchange(sum(masks[0]))
        self.done += 1
        self.seconds += time.perf_counter() - started
        error = math.fsum(e for e, _ in self.best.values()) / len(self.best)
        kept = sum(masks[-1])
        flips = sum(before.get(k) != found for k, found in self.best.items())
        self.figures = Figures(error, error, 0.0, kept / self.num_calls, 0.0, kept, flips)
        return self.progress()

    def progress(self) -> SearchProgress:
        """Return the record of the last step."""
        return SearchProgress(
            search_step=self.done,
            num_steps=self.num_steps,
            **self.figures._asdict(),
            forwards=self.forwards,
            sample_forwards=self.sample_forwards,
            seconds=self.seconds,
            outcome=self._outcome() if self.done == self.num_steps else None,
            snapshot=self._state,
        )

    def _exchange(self, num_computed: int) -> None:
        """Move one computed call to a free neighbour, as long as the error falls."""
        improved = True
        while improved:
            mask = self.best[num_computed][1]
            moves = [
                _flip(mask, call, call + side)
                for call in range(1, self.num_calls)
                for side in (-1, 1)
                if mask[call] and 0 < call + side < self.num_calls and not mask[call + side]
            ]
            improved = any([self._note(move) for move in moves])

    def _note(self, mask: Mask) -> bool:
        """Keep the mask if it is the best of its number of calls; ties keep the earlier one."""
        error = self._error(mask)
        best = self.best.get(sum(mask))
        if best is not None and error >= best[0]:
            return False
        self.best[sum(mask)] = (error, mask)
        return True

    @torch.no_grad()
    def _error(self, mask: Mask) -> float:
        """Return the MSE of the final latents; predictions of a shared prefix are not repeated.

        The sampler's steps are: they cost next to nothing, and multistep state needs no copies.
        """
        tried, known = self.seen
        same = (now == before for now, before in zip(mask, tried, strict=False))
        shared = known[: sum(takewhile(bool, same))]
        problem, calls = self.problem, self.calls
        before = calls.computed
        calls.start(mask, shared)
        final = rollout(problem.model, self.batch, problem.sampler, on_call=calls.start_call)
        self.forwards += calls.computed - before
        self.sample_forwards += (calls.computed - before) * len(self.batch)
        self.seen = (mask, shared)
        error = (final.double() - self.full.double()).square().mean().item()
        if not math.isfinite(error):
            raise SearchError(
                f"the latents are not finite when calls {_calls(mask)} of {self.num_calls} are "
                f"computed; set the model's dtype to float32 (it is {problem.model.settings.dtype})"
            )
        return error

    def _outcome(self) -> SearchOutcome:
        masks = {k: _calls(mask) for k, (_, mask) in sorted(self.best.items())}
        return SearchOutcome(
            step_masks=masks, forwards=self.forwards, sample_forwards=self.sample_forwards
        )

    def _state(self) -> dict[str, Tensor]:
        counts = sorted(self.best)
        return {
            "search_step": torch.tensor(self.done),
            "forwards": torch.tensor(self.forwards),
            "sample_forwards": torch.tensor(self.sample_forwards, dtype=torch.float64),
            "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            "errors": torch.tensor([self.best[k][0] for k in counts], dtype=torch.float64),
            "figures": self.figures.to_tensor(),
            "masks": torch.tensor([self.best[k][1] for k in counts], dtype=torch.bool),
        }

    def _load(self, state: Mapping[str, Tensor]) -> None:
        if "masks" not in state or state["masks"].shape[1:] != (self.num_calls,):
            raise SearchError("the saved state belongs to another search; delete it and start anew")
        self.done, self.forwards = int(state["search_step"]), int(state["forwards"])
        self.sample_forwards = float(state["sample_forwards"])
        self.seconds = float(state["seconds"])
        self.figures = Figures.from_tensor(state["figures"])
        rows = zip(state["errors"].tolist(), state["masks"].tolist(), strict=True)
        self.best = {sum(mask): (error, tuple(mask)) for error, mask in rows}


def _calls(mask: Mask) -> tuple[int, ...]:
    return tuple(call for call, computed in enumerate(mask) if computed)


def _flip(mask: Mask, *calls: int) -> Mask:
    return tuple(kept != (call in calls) for call, kept in enumerate(mask))
