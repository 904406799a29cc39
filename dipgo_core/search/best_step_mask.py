"""Which calls to compute when calls are computed whole or skipped: the bar a search must pass.

For each number of computed calls that a target asks for: the mask whose final latents are nearest
to the dense model's on calibration items. Masks are ranked by what one dense run foretells; the
best are run, and after these what differs from the best one in a single call's place.

What is foretold: a skipped call repeats the last prediction, which changes its own by the
differences between the dense run's predictions since then; how far a change at a call reaches the
latents is measured at a few calls, each skipped alone, and interpolated. The changes of all skipped
calls are added up as vectors, so that they may cancel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations, takewhile
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.baselines import equal_compute_calls, uniform_calls
from dipgo_core.errors import SearchError
from dipgo_core.graph import INPUT
from dipgo_core.hooks import MethodHook, install
from dipgo_core.outcome import SearchOutcome
from dipgo_core.pipelines import LoadedModel
from dipgo_core.postprocess import affordable_calls
from dipgo_core.repeat import Repeat, repeat_of
from dipgo_core.sampling import Batch, noise_scheduler, rollout
from dipgo_core.search.calibration import batch_of, check_problem, dense_latents, draw_items
from dipgo_core.search.guidance import Guidance, learned_guidance
from dipgo_core.search.objective import SMALLEST
from dipgo_core.search.progress import NOTHING_YET, Figures, SearchProblem, SearchProgress
from dipgo_core.strategies import PROBED_CALLS, PROBED_ITEMS, TRIED_MASKS
from dipgo_core.structures import Tensors

#: Up to this many masks of one number of calls are all ranked; of more, exchanges find the best.
RANKED: Final = 20_000
#: Random masks that exchanges start from, beside evenly spread ones.
STARTS: Final = 12

Mask = tuple[bool, ...]
Masks = npt.NDArray[np.bool_]


def search_step_masks(problem: SearchProblem) -> Iterator[SearchProgress]:
    """Find the best masks for the targets; items: one batch drawn by the seed.

    A target has two numbers of calls, mostly the same: as many as its budget holds, and as few as
    spend at least that. `loss` and `consistency` are the mean, over numbers of calls done so far,
    of the best mean logarithm of the latents' mean square error; `kept_gates` and `compute_ratio`
    are those of the mask tried last. A resumed search ends with the same masks, at some more
    forwards.

    Raises:
        SearchError: no target, latents that are not finite, or a state of another search.
    """
    if not problem.targets:
        raise SearchError("strategy best_step_mask needs targets to search for")
    yield from _MaskSearch(problem).run()


@dataclass(frozen=True)
class _Known:
    """What a call gave, and what a call that is skipped after it gives again."""

    prediction: Tensors
    repeatable: Tensors


class _MaskedCalls:
    """Policy that computes the calls of a mask, and repeats what is known already."""

    def __init__(self, model: LoadedModel, repeat: Repeat) -> None:
        self._model, self._repeat = model, repeat
        self.computed = 0
        self.guidance: Guidance | None = None

    @contextmanager
    def installed(self, problem: SearchProblem) -> Iterator[None]:
        graph, denoiser = problem.graph, problem.model.denoiser
        whole = replace(graph, blocks=graph.blocks[:1], producers=((INPUT,),))
        handle = install(denoiser, whole, self)
        try:
            yield
        finally:
            handle.remove()

    def start(self, mask: Mask, known: list[_Known], images: int) -> None:
        """Begin a run of so many images; `known` grows by what its calls give."""
        self._mask, self._known, self._images = mask, known, images

    def start_call(self, call: int) -> None:
        self._call = call
        if call == 0 and self.guidance is None:
            MethodHook(self._model.pipe.scheduler, "step", self._step)

    def _step(self, step: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Learn how the parts of a batch make up the guided prediction, which is linear in them."""
        first = self._known[0].prediction[0]
        if self.guidance is None and first is not None:
            guided = args[0] if args else kwargs["model_output"]
            self.guidance = learned_guidance(first, guided, self._images)
        return step(*args, **kwargs)

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


@dataclass(frozen=True, eq=False)
class Foretold:
    """What a dense run and a few skips foretell of all masks.

    grams: (B, T, T), inner products of the changes between neighbouring calls' predictions, call t
    against t - 1. reach: (T,), root of what a mean square there becomes in the latents.
    """

    grams: npt.NDArray[np.float64]
    reach: npt.NDArray[np.float64]

    def scores(self, masks: Masks) -> npt.NDArray[np.float64]:
        """Return the mean logarithm of the foretold mean square errors.  # (M, T) -> (M,)"""
        shares = np.zeros(masks.shape)
        behind = np.zeros(len(masks))
        for call in range(masks.shape[1] - 1, 0, -1):  # a change reaches all later skips of its gap
            behind = np.where(masks[:, call], 0.0, behind + self.reach[call])
            shares[:, call] = behind
        squares = np.einsum("mt,bts,ms->mb", shares, self.grams, shares, optimize=True)
        found: npt.NDArray[np.float64] = np.log(np.maximum(squares, SMALLEST)).mean(1)
        return found

    def best(self, computed: int, wanted: int) -> list[Mask]:
        """Return the masks of so many computed calls of which most is foretold, best first."""
        calls = len(self.reach)
        if math.comb(calls - 1, computed - 1) <= RANKED:
            masks = _all_masks(computed, calls)
        else:
            masks = self._exchanged(computed, wanted)
        order = np.argsort(self.scores(masks), kind="stable")[:wanted]
        return [tuple(row) for row in masks[order].tolist()]

    def _exchanged(self, computed: int, wanted: int) -> Masks:
        """Return good masks: exchange a computed call for a skipped one as long as that helps."""
        calls = len(self.reach)
        rng = np.random.default_rng(computed)
        starts = [_mask(uniform_calls(computed, calls), calls)]
        for _ in range(STARTS):
            drawn = rng.choice(calls - 1, computed - 1, replace=False) + 1
            starts.append(_mask((0, *drawn.tolist()), calls))
        found: dict[Mask, float] = {}
        for mask in starts:
            score = float(self.scores(np.array([mask]))[0])
            while True:
                near = _exchanges(mask)
                scores = self.scores(near)
                for at in np.argsort(scores, kind="stable")[:wanted]:
                    found[tuple(near[at].tolist())] = float(scores[at])
                least = int(np.argmin(scores))
                found[mask] = score
                if scores[least] >= score:
                    break
                mask, score = tuple(near[least].tolist()), float(scores[least])
        return np.array(sorted(found, key=lambda one: found[one])[:wanted])


class _MaskSearch:
    """The best masks so far, and the predictions of the mask tried last."""

    def __init__(self, problem: SearchProblem) -> None:
        check_problem(problem)
        self.problem = problem
        scheduler = noise_scheduler(problem.model, problem.sampler)
        self.num_calls = len(scheduler.timesteps)
        self.counts = sorted(
            {
                calls(target, self.num_calls)
                for target in problem.targets
                for calls in (affordable_calls, equal_compute_calls)
            }
        )
        full, self.forwards = dense_latents(problem)
        self.sample_forwards = float(self.forwards and self.num_calls * len(problem.items))
        self.full = full.to(problem.model.device)
        chosen = draw_items(problem.settings, 0, len(problem.items))[0]
        self.items, self.probed = chosen, chosen[:PROBED_ITEMS]
        self.calls = _MaskedCalls(problem.model, repeat_of(scheduler))
        self.best: dict[int, tuple[float, Mask]] = {}
        self.seconds, self.figures = 0.0, NOTHING_YET
        if problem.resume is not None:
            self._load(problem.resume)

    def run(self) -> Iterator[SearchProgress]:
        if len(self.best) == len(self.counts):  # interrupted between its last step and its record
            yield self.progress()
        with self.calls.installed(self.problem):
            started = time.perf_counter()
            foretold = self._foretold()
            for count in self.counts:
                if count in self.best:
                    continue
                self._try(count, foretold)
                self.seconds += time.perf_counter() - started
                yield self.progress()
                started = time.perf_counter()

    def _try(self, count: int, foretold: Foretold) -> None:
        even = _mask(uniform_calls(count, self.num_calls), self.num_calls)
        first = list(dict.fromkeys([even, *foretold.best(count, TRIED_MASKS // 2)]))
        runs = _Runs(self, self.items)
        found = {mask: runs.score(mask) for mask in sorted(first, reverse=True)}
        best = min(first, key=lambda mask: found[mask])
        while len(found) < TRIED_MASKS:
            near = [mask for mask in _moves(best) if mask not in found]
            if not near:
                break
            mask = near[int(np.argmin(foretold.scores(np.array(near))))]
            found[mask] = runs.score(mask)
            best = min(best, mask, key=lambda mask: found[mask])
        self.best[count] = (found[best], best)
        score = math.fsum(one for one, _ in self.best.values()) / len(self.best)
        flips = sum(a != b for a, b in zip(best, even, strict=True))
        ratio = count / self.num_calls
        self.figures = Figures(score, score, 0.0, ratio, 0.0, count, flips)

    def _foretold(self) -> Foretold:
        """Run the dense model, and skip a few calls, each alone."""
        dense = _Runs(self, self.items)
        whole = (True,) * self.num_calls
        dense.error(whole)
        changes = self._changes(dense)
        grams = np.einsum("tbn,sbn->bts", changes, changes, optimize=True) / changes.shape[2]
        probes = _Runs(self, self.probed)
        probes.error(whole)
        sizes = np.square(self._changes(probes)).mean(2)  # (T, B)
        last = self.num_calls - 1
        at = np.unique(np.linspace(1, last, min(PROBED_CALLS, last)).round().astype(int))
        logs = [self._reach(probes, int(call), sizes[call]) for call in at[::-1]][::-1]
        reach = np.exp(np.interp(np.arange(self.num_calls), at, logs) / 2)
        return Foretold(grams, reach)

    def _reach(self, probes: _Runs, call: int, sizes: npt.NDArray[np.float64]) -> float:
        found = probes.error(tuple(other != call for other in range(self.num_calls)))
        return float(np.log(np.maximum(found, SMALLEST) / np.maximum(sizes, SMALLEST)).mean())

    def _changes(self, runs: _Runs) -> npt.NDArray[np.float64]:
        """Return how a dense run's guided predictions change from call to call.  # (T, B, n)"""
        guidance = self.calls.guidance
        firsts = [known.repeatable[0] for known in runs.known]
        assert guidance is not None
        pairs = zip(firsts, firsts[:1] + firsts[:-1], strict=True)
        found = [guidance.of(a - b) for a, b in pairs if a is not None and b is not None]
        return np.asarray(torch.stack(found).double().cpu().numpy())

    def progress(self) -> SearchProgress:
        """Return the record of the last step."""
        done = len(self.best)
        return SearchProgress(
            search_step=done,
            num_steps=len(self.counts),
            **self.figures._asdict(),
            forwards=self.forwards,
            sample_forwards=self.sample_forwards,
            seconds=self.seconds,
            outcome=self._outcome() if done == len(self.counts) else None,
            snapshot=self._state,
        )

    def _outcome(self) -> SearchOutcome:
        masks = {k: _calls(mask) for k, (_, mask) in sorted(self.best.items())}
        return SearchOutcome(
            step_masks=masks, forwards=self.forwards, sample_forwards=self.sample_forwards
        )

    def _state(self) -> dict[str, Tensor]:
        counts = sorted(self.best)
        return {
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
        self.forwards += int(state["forwards"])
        self.sample_forwards += float(state["sample_forwards"])
        self.seconds = float(state["seconds"])
        self.figures = Figures.from_tensor(state["figures"])
        rows = zip(state["errors"].tolist(), state["masks"].tolist(), strict=True)
        self.best = {sum(mask): (error, tuple(mask)) for error, mask in rows}


class _Runs:
    """Runs of masks on the same items; predictions of a prefix shared with the last are kept.

    The sampler's steps are made again: they cost next to nothing, and multistep state needs no
    copies.
    """

    def __init__(self, search: _MaskSearch, items: Sequence[int]) -> None:
        self._search = search
        self._batch: Batch = batch_of(search.problem, items)
        self._full = search.full[list(items)].double()
        self._mask: Mask = ()
        self.known: list[_Known] = []

    def score(self, mask: Mask) -> float:
        """Return the mean logarithm of the images' mean square errors."""
        return float(np.log(np.maximum(self.error(mask), SMALLEST)).mean())

    @torch.no_grad()
    def error(self, mask: Mask) -> npt.NDArray[np.float64]:
        """Return the mean square errors of the final latents.  # (B,)"""
        search, calls, problem = self._search, self._search.calls, self._search.problem
        same = (now == before for now, before in zip(mask, self._mask, strict=False))
        known, before = self.known[: sum(takewhile(bool, same))], calls.computed
        calls.start(mask, known, len(self._batch))
        final = rollout(problem.model, self._batch, problem.sampler, on_call=calls.start_call)
        search.forwards += calls.computed - before
        search.sample_forwards += (calls.computed - before) * len(self._batch)
        self._mask, self.known = mask, known
        errors = (final.double() - self._full).square().flatten(1).mean(1)
        if not bool(errors.isfinite().all()):
            raise SearchError(
                f"the latents are not finite when calls {_calls(mask)} of {search.num_calls} are "
                f"computed; set the model's dtype to float32 (it is {problem.model.settings.dtype})"
            )
        return np.asarray(errors.cpu().numpy(), dtype=np.float64)


def _calls(mask: Mask) -> tuple[int, ...]:
    return tuple(call for call, computed in enumerate(mask) if computed)


def _mask(computed: Sequence[int], calls: int) -> Mask:
    return tuple(call in computed for call in range(calls))


def _all_masks(computed: int, calls: int) -> Masks:
    free = combinations(range(1, calls), computed - 1)
    return np.array([_mask((0, *chosen), calls) for chosen in free])


def _exchanges(mask: Mask) -> Masks:
    """Return all masks with one computed call, but the first, exchanged for a skipped one."""
    places = range(1, len(mask))
    pairs = [(a, b) for a in places if mask[a] for b in places if not mask[b]]
    return np.array([_flip(mask, *pair) for pair in pairs], dtype=bool).reshape(-1, len(mask))


def _moves(mask: Mask) -> list[Mask]:
    """Return all masks with one computed call, but the first, moved to the place beside it."""
    pairs = zip(range(1, len(mask)), range(2, len(mask)), strict=False)
    return [_flip(mask, *pair) for pair in pairs if mask[pair[0]] != mask[pair[1]]]


def _flip(mask: Mask, *calls: int) -> Mask:
    return tuple(kept != (call in calls) for call, kept in enumerate(mask))
