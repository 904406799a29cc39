"""What all searches at a budget share: seeds, candidates that were run, progress, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dipgo_core.baselines import uniform_calls
from dipgo_core.errors import SearchError
from dipgo_core.gates import GateTable
from dipgo_core.outcome import SearchOutcome
from dipgo_core.postprocess import affordable_calls, budget_macs
from dipgo_core.sampling import noise_scheduler
from dipgo_core.search.calibration import check_problem, dense_latents
from dipgo_core.search.errors import ReuseErrors
from dipgo_core.search.objective import Measured, TrueObjective
from dipgo_core.search.progress import NOTHING_YET, Figures, SearchProblem, SearchProgress
from dipgo_core.search.reads import Rows, TableSpace
from dipgo_core.strategies import NEEDS


class Candidate(NamedTuple):
    """A table in canonical form, and how its skipped calls predict (``GateTable``)."""

    rows: Rows
    extrapolation: float = 0.0


@dataclass(eq=False, kw_only=True)
class Hunt:
    """The search of one target: its budget, and every candidate that was run.

    rng: of this target alone, so that its table does not depend on other targets. items: numbers
    of calibration items in the order they are used; candidates are run on the first `samples`.
    errors: what single reuses were measured to do, where the strategy asks for it. tried: what was
    run on the screened items; measured: on how many items; spent: see `left`.
    """

    problem: SearchProblem
    objective: TrueObjective
    space: TableSpace
    target: float
    budget: int
    rng: np.random.Generator
    items: tuple[int, ...]
    errors: ReuseErrors | None
    tried: dict[Candidate, Measured] = field(default_factory=dict)
    measured: dict[Candidate, int] = field(default_factory=dict)
    spent: float = 0.0

    @property
    def left(self) -> float:
        """What may still be spent on this target, in dense runs of one image."""
        return self.problem.settings.effort - self.spent

    def candidate(self, rows: Rows, extrapolation: float = 0.0) -> Candidate:
        """Return a table in canonical form; where no call is skipped, nothing is extrapolated."""
        closed = self.space.close(rows)
        return Candidate(closed, extrapolation if 0 in closed else 0.0)

    def cost(self, candidate: Candidate) -> float:
        """Return what one image of a table costs, in dense runs of one image."""
        graph, calls = self.space.graph, self.space.num_calls
        return graph.macs(self.space.table_of(candidate.rows)) / graph.call_macs() / calls

    def affords(self, candidate: Candidate) -> bool:
        """Return whether a candidate may still be run on the screened items."""
        return self.cost(candidate) * len(self.screened) <= self.left

    @property
    def screened(self) -> tuple[int, ...]:
        """The items that candidates are run on."""
        return self.items[: self.problem.settings.samples]

    def run(self, candidate: Candidate) -> Measured:
        """Run a candidate on the screened items.

        Raises:
            SearchError: it spends more than the budget.
        """
        if self.space.macs(candidate.rows) > self.budget:
            raise SearchError(f"a candidate for target {self.target} is above its budget")
        self.tried[candidate] = self.measure(candidate, len(self.screened))
        return self.tried[candidate]

    def measure(self, candidate: Candidate, images: int) -> Measured:
        """Return the errors of a table on the first so many items; none is run twice."""
        known = self.measured.get(candidate, 0)
        self.spent += max(0, images - known) * self.cost(candidate)
        self.measured[candidate] = max(images, known)
        return self.objective.measure(self.space.table_of(*candidate), self.items[:images])

    def ranked(self) -> list[Candidate]:
        """Return what was run, nearest to the dense run first; of equals the earlier one."""
        return sorted(self.tried, key=lambda candidate: self.tried[candidate].score)

    def step_mask(self, extrapolation: float = 0.0) -> Candidate:
        """Return the best step mask of as many calls as the budget holds, evenly spread if none."""
        calls = affordable_calls(self.target, self.space.num_calls)
        found = (self.problem.step_masks or {}).get(calls) or self._uniform(calls)
        return self._mask(found, extrapolation)

    def uniform(self, extrapolation: float = 0.0) -> Candidate:
        """Return evenly spread calls, as many as the budget holds."""
        calls = affordable_calls(self.target, self.space.num_calls)
        return self._mask(self._uniform(calls), extrapolation)

    def _uniform(self, calls: int) -> tuple[int, ...]:
        return uniform_calls(calls, self.space.num_calls)

    def _mask(self, calls: tuple[int, ...], extrapolation: float) -> Candidate:
        space = self.space
        gates = GateTable.from_calls(calls, space.num_calls, space.graph.num_blocks)
        return self.candidate(space.rows_of(gates), extrapolation)


Steps = Generator[None, None, Candidate]
"""The search of one target: yields after every run, returns the table that it chose."""


def search_tables(
    problem: SearchProblem, steps: Callable[[Hunt], Steps]
) -> Iterator[SearchProgress]:
    """Search every target of a problem; yield after every run, at last the outcome.

    What is kept of a search is every run it made; a resumed one decides as before from these, and
    ends with the same tables. Steps are dense runs of one image, of those that may be spent.

    Raises:
        SearchError: no target, latents that are not finite, or a state of another search.
        TargetError: a target that no SubNet reaches.
    """
    if not problem.targets:
        raise SearchError(f"strategy {problem.settings.strategy} needs targets to search for")
    yield from _Search(problem).run(steps)


class _Search:
    """Runs of all targets, one target after the other."""

    def __init__(self, problem: SearchProblem) -> None:
        check_problem(problem)
        self.problem = problem
        self.num_steps = problem.settings.effort * len(problem.targets)
        self.num_calls = len(noise_scheduler(problem.model, problem.sampler).timesteps)
        full, forwards = dense_latents(problem)
        self.objective = TrueObjective(problem, full)
        known = problem.errors if "errors" in NEEDS[problem.settings.strategy] else None
        self.errors = None if known is None else ReuseErrors.from_tensors(known)
        if forwards:
            self.objective.forwards = forwards
            self.objective.sample_forwards = float(self.num_calls * len(problem.items))
        self.seconds, self.done, self.figures = 0.0, 0, NOTHING_YET
        self.tables: dict[float, Candidate] = {}
        if problem.resume is not None:
            self.seconds = self.objective.load(problem.resume)

    def run(self, steps: Callable[[Hunt], Steps]) -> Iterator[SearchProgress]:
        for number, target in enumerate(self.problem.targets):
            hunt = self._hunt(target)
            yield from self._search(hunt, steps(hunt), number * self.problem.settings.effort)
        self.done = self.num_steps
        yield self._progress(last=True)

    def _search(self, hunt: Hunt, steps: Steps, before: int) -> Iterator[SearchProgress]:
        """Search one target; yield after runs that are new, not after those that were kept."""
        effort = self.problem.settings.effort
        while True:
            started, spent = time.perf_counter(), self.objective.forwards
            try:
                next(steps)
            except StopIteration as stop:
                self.tables[hunt.target] = stop.value
                self.seconds += time.perf_counter() - started
                return
            self.done = max(self.done + 1, before + math.ceil(min(hunt.spent, effort)))
            self.done = min(self.done, self.num_steps - 1)
            self._note(hunt)
            if self.objective.forwards > spent:
                self.seconds += time.perf_counter() - started
                yield self._progress()

    def _hunt(self, target: float) -> Hunt:
        problem, graph = self.problem, self.problem.graph
        settings, seed = problem.settings, problem.settings.seed
        order = np.random.default_rng([seed, 0]).permutation(len(problem.items))
        return Hunt(
            problem=problem,
            objective=self.objective,
            space=TableSpace(
                graph,
                self.num_calls,
                min(settings.staleness, self.num_calls - 1),  # as the errors were measured
                problem.convention,
            ),
            target=target,
            budget=budget_macs(graph, target, self.num_calls, problem.convention),
            rng=np.random.default_rng([seed, 1, round(target * 1_000_000)]),
            items=tuple(order.tolist()),
            errors=self.errors,
        )

    def _note(self, hunt: Hunt) -> None:
        """Figures: the best score so far, and the table that was run last."""
        if not hunt.tried:
            return
        best, last = hunt.ranked()[0], next(reversed(hunt.tried))
        score = hunt.tried[best].score
        ratio = hunt.space.macs(last.rows) / (hunt.budget / (1 - hunt.target))
        kept = sum(row.bit_count() for row in last.rows)
        self.figures = Figures(score, score, 0.0, ratio, 0.0, kept, int(best == last))

    def _progress(self, last: bool = False) -> SearchProgress:
        return SearchProgress(
            search_step=self.done,
            num_steps=self.num_steps,
            **self.figures._asdict(),
            forwards=self.objective.forwards,
            sample_forwards=self.objective.sample_forwards,
            seconds=self.seconds,
            outcome=self._outcome() if last else None,
            snapshot=self._state,
        )

    def _outcome(self) -> SearchOutcome:
        space = TableSpace(self.problem.graph, self.num_calls, 1, self.problem.convention)
        found = self.tables.items()
        return SearchOutcome(
            tables={t: tuple(space.table_of(one.rows).to_strings()) for t, one in found},
            extrapolations={t: one.extrapolation for t, one in found if one.extrapolation},
            forwards=self.objective.forwards,
            sample_forwards=self.objective.sample_forwards,
        )

    def _state(self) -> dict[str, Tensor]:
        seconds = torch.tensor(self.seconds, dtype=torch.float64)
        return {"seconds": seconds, **self.objective.to_tensors()}
