"""A sweep as the read commands see it: its file, store and plan, and what is finished of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.driver import plan_sweep
from orchestrator.gains import Comparisons
from orchestrator.headlines import Headline, headlines, statements
from orchestrator.pareto import SPEED_OF, Front, pareto_fronts, pareto_json
from orchestrator.planned import Plan
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.store import Store, open_store
from orchestrator.sweep_file import SweepFile, load_sweep


@dataclass(frozen=True, eq=False)
class Results:
    """One sweep and everything the store holds of it; figures are worked out when asked for."""

    sweep: SweepFile
    store: Store
    plan: Plan

    @cached_property
    def comparisons(self) -> Comparisons:
        return Comparisons(self.store, self.store.records())

    @cached_property
    def points(self) -> tuple[ResolvedPoint, ...]:
        return resolve_points(
            self.plan.points,
            self.store.records(),
            self.store,
            quality=self.sweep.objective.quality,
            comparisons=self.comparisons,
        )

    @cached_property
    def fronts(self) -> tuple[Front, ...]:
        return pareto_fronts(
            self.points,
            speed=SPEED_OF[self.sweep.objective.speed],
            differences=self.comparisons.difference,
            knee=self.sweep.objective.knee,
        )

    @property
    def headline_fronts(self) -> tuple[Front, ...]:
        """Fronts of the sweep's own quality metric."""
        quality = self.sweep.objective.quality
        return tuple(front for front in self.fronts if front.objectives[1] == quality)

    @cached_property
    def headlines(self) -> tuple[Headline, ...]:
        return headlines(self.points, self.sweep.objective.quality)

    def to_json(self) -> dict[str, Any]:
        """Return the document of `dipgo-sweep pareto --json`."""
        lines = [line.to_json() for line in self.headlines]
        said = statements(self.headlines, self.points)
        return pareto_json(self.points, self.fronts, lines, said)


def open_results(file: Path, overrides: Sequence[str]) -> Results:
    """Read a sweep file and plan it against its store, without network and without torch.

    Raises:
        DipgoError: the file has errors, or the store cannot be used.
    """
    sweep = load_sweep(file, overrides)
    store = open_store(sweep.storage)
    return Results(sweep, store, plan_sweep(sweep, store))


def write_report_files(results: Results, folder: Path | None) -> tuple[str, ...]:
    """Write the report of what is finished and return its files; default: in the store."""
    from orchestrator.publish import REPORT, put_report
    from orchestrator.report import FILES, write_report

    sweep, store = results.sweep, results.store
    if folder is not None:
        write_report(sweep, results.points, results.fronts, store, folder)
        return tuple(str(folder / name) for name in FILES)
    with TemporaryDirectory(prefix="dipgo-report-") as made:
        write_report(sweep, results.points, results.fronts, store, made)
        put_report(store, sweep.name, Path(made))
    return tuple(store.sweep_file_place(sweep.name, f"{REPORT}/{name}") for name in FILES)
