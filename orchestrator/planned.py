"""What a plan is: tasks with their state, and points with the tasks that measure them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.memory import MemoryRow, without_repetition
from orchestrator.methods import Method
from orchestrator.records import Task, TaskKind
from orchestrator.resources import ResourceRow

TaskState = Literal["cached", "ready", "waiting", "unresolved"]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """Where a point left the race. images: of its last rung.

    by: metric -> evaluation at that rung which is at least as fast and surely better.
    """

    images: int
    by: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point of the sweep: a way to run a model, to be measured.

    sampler: of the point itself (`few_steps` takes fewer steps than `sampler_dense`).
    strategy, loss, search: of the search it came from. search: all settings of that search.
    variant: what tells points of a baseline apart, as `PointSpec` has it.
    keep, extrapolation: the gate table (`GateTable`), `keep` None until the records it follows from
    are there.
    error: why there is no such point (an unreachable target).
    evaluate_key, latency_key, calibration_key: tasks that measure it, None until `keep` is known;
        calibration_key for searched points and trivial baselines; latency_key where measured,
        throughput_keys of batch sizes other than the first.
    label: of its tasks. images: how many evaluate_key has, those of the highest rung reached so
        far. lower_keys: evaluations at the rungs below. race_keys: races it has been in.
    needs: tasks whose records decide `keep`.
    """

    key: str
    model: str
    model_id: str
    method: Method
    strategy: str | None = None
    loss: Mapping[str, Any] | None = None
    search: Mapping[str, Any] | None = None
    sampler: Mapping[str, Any]
    sampler_dense: Mapping[str, Any]
    granularity: str = "block"
    target: float | None = None
    seed: int | None = None
    variant: str | None = None
    protocol_hash: str
    reference_key: str
    statistics_keys: tuple[str, ...] = ()
    keep: tuple[str, ...] | None = None
    extrapolation: float = 0.0
    error: str | None = None
    search_key: str | None = None
    evaluate_key: str | None = None
    calibration_key: str | None = None
    latency_key: str | None = None
    throughput_keys: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    label: str = ""
    images: int | None = None
    lower_keys: tuple[str, ...] = ()
    race_keys: tuple[str, ...] = ()
    dropped: Dropped | None = None

    @property
    def evaluate_keys(self) -> tuple[str, ...]:
        """Its evaluations on the test set, from the lowest rung to the highest planned so far."""
        return (*self.lower_keys, *([] if self.evaluate_key is None else [self.evaluate_key]))

    @property
    def task_keys(self) -> tuple[str, ...]:
        """Tasks whose records make this point complete."""
        keys = (self.evaluate_key, self.latency_key, *self.throughput_keys, self.calibration_key)
        known = tuple(key for key in keys if key is not None)
        return (*known, *self.lower_keys, *self.race_keys)


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """A task with its place in the plan; `task` is None until its inputs are known.

    expect: of such a placeholder, what it will be: `images`, and `compute`, the kept share of MACs.
    """

    key: str
    kind: TaskKind
    model: str
    label: str
    needs: tuple[str, ...]
    state: TaskState
    task: Task | None = None
    expect: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "kind": self.kind,
            "model": self.model,
            "label": self.label,
            "needs": list(self.needs),
            "state": self.state,
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything a sweep consists of, given the records there are. Tasks are unique by key."""

    models: tuple[str, ...]
    tasks: tuple[PlannedTask, ...]
    points: tuple[Point, ...]
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by hash
    searches: tuple[str, ...] = ()  # keys of the grid's searches, not of best_step_mask
    memory: tuple[MemoryRow, ...] = ()
    resources: tuple[ResourceRow, ...] = ()
    left_out: tuple[str, ...] = ()  # a line for each baseline that a model lacks, and why

    @property
    def ready(self) -> tuple[Task, ...]:
        """Tasks that could be run now."""
        return tuple(p.task for p in self.tasks if p.state == "ready" and p.task is not None)

    @property
    def complete(self) -> bool:
        """Whether every task has its record."""
        return all(planned.state == "cached" for planned in self.tasks)

    def to_json(self) -> dict[str, Any]:
        """Return counts over the whole sweep, and all tasks; `cached` of them are done."""
        found = {p.evaluate_key or p.key for p in self.points if p.method == "search"}
        baselines = [p for p in self.points if p.method not in ("search", "dense")]
        return {
            "models": len(self.models),
            "searches": len(self.searches),
            "evaluations": len(found),
            "baselines": len(baselines),
            "cached": sum(planned.state == "cached" for planned in self.tasks),
            "tasks": [planned.to_json() for planned in self.tasks],
            "memory": [row.to_json() for row in self.memory],
            "resources": [row.to_json() for row in self.resources],
            "left_out": list(self.left_out),
        }

    @property
    def too_large(self) -> tuple[str, ...]:
        """A line for each kind of task that is still to do and does not fit on its GPU."""
        to_do = {(task.model, task.kind) for task in self.tasks if task.state != "cached"}
        return tuple(
            row.problem
            for row in without_repetition(self.memory)
            if row.fit.fits is False and (row.model, row.kind) in to_do
        )
