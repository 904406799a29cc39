"""From a sweep and the records there are to tasks and points. Pure: no torch, no files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dipgo_core.config import SamplerSettings, SearchSettings
from dipgo_core.errors import TargetError
from dipgo_core.graph import BlockGraph
from dipgo_core.outcome import SearchOutcome
from orchestrator.facts import ModelFacts
from orchestrator.memory import MemoryRow
from orchestrator.methods import (
    CALIBRATED,
    PointSpec,
    gates_of,
    searches,
    step_mask_search,
)
from orchestrator.model_tasks import ModelTasks
from orchestrator.planned import Dropped, Plan, PlannedTask, Point, TaskState
from orchestrator.records import Record, Task, TaskKind, content_key
from orchestrator.rungs import candidates_of
from orchestrator.sweep_settings import SweepFile


@dataclass(frozen=True)
class Resolution:
    """The gates of a point, or why it has none."""

    keep: tuple[str, ...] | None = None
    error: str | None = None


#: Resolutions kept between plans of one sweep, by point; what they follow from never changes.
Memo = MutableMapping[str, Resolution]


def build_plan(
    sweep: SweepFile,
    records: Mapping[str, Record],
    *,
    facts: Mapping[str, ModelFacts],
    device: str,
    memo: Memo | None = None,
    failed: Collection[str] = (),
) -> Plan:
    """Return all tasks and points of a sweep; a task whose record exists is `cached`.

    facts: by name of the model (`gather_facts`). device: name of the device latency is measured on.
    failed: keys of tasks that nobody tries again; races do not wait for points that rest on them.
    memo: pass the same one again to plan anew at little cost after a record has landed.
    """
    builder = _Builder(records, {} if memo is None else memo, frozenset(failed))
    for model in sweep.models:
        builder.add_model(
            ModelTasks(sweep=sweep, model=model, facts=facts[model.name], device=device)
        )
    return Plan(
        models=tuple(model.name for model in sweep.models),
        tasks=tuple(builder.tasks.values()),
        points=tuple(builder.points),
        protocols=builder.protocols,
        searches=tuple(dict.fromkeys(builder.searches)),
        memory=tuple(builder.memory),
    )


class _Builder:
    """Collects the tasks and points of one plan."""

    def __init__(self, records: Mapping[str, Record], memo: Memo, failed: Collection[str]) -> None:
        self.records = records
        self.memo = memo
        self.failed = failed
        self.tasks: dict[str, PlannedTask] = {}
        self.points: list[Point] = []
        self.searches: list[str] = []
        self.protocols: dict[str, Mapping[str, Any]] = {}
        self.memory: list[MemoryRow] = []

    def add_model(self, tasks: ModelTasks) -> None:
        for protocol in (*tasks.protocols, tasks.calibration_protocol):
            self.protocols[protocol.hash] = protocol.to_json()
        self.memory += tasks.memory.rows
        self._add(tasks, tasks.reference("test"))
        if any(spec.search is not None or spec.method in CALIBRATED for spec in tasks.specs):
            self._add(tasks, tasks.reference("calibration"))
        for task in tasks.statistics.values():
            self._add(tasks, task)
        for settings in searches(tasks.model):
            self.searches.append(self._add(tasks, tasks.search(settings)))
        step_masks = step_mask_search(tasks.model)
        if step_masks is not None:
            self._add(tasks, tasks.search(step_masks))
        points = [self._add_point(tasks, spec) for spec in tasks.specs]
        for rung in range(len(tasks.protocols) - 1):
            points = self._race(tasks, points, rung)
        self.points += points

    def _add_point(self, tasks: ModelTasks, spec: PointSpec) -> Point:
        point = _unresolved_point(tasks, spec)
        if all(need in self.records for need in point.needs):
            found = self._resolve(tasks, spec, point)
            point = replace(point, keep=found.keep, error=found.error)
        if point.keep is not None:
            point = self._add_measurements(tasks, spec, point, point.keep)
        elif point.error is None:
            self._add_placeholders(tasks, spec, point)
        return point

    def _resolve(self, tasks: ModelTasks, spec: PointSpec, point: Point) -> Resolution:
        if point.key not in self.memo:
            search = None if point.search_key is None else self.records[point.search_key]
            self.memo[point.key] = resolve_gates(
                tasks, spec, self.records[point.reference_key], search
            )
        return self.memo[point.key]

    def _add_measurements(
        self, tasks: ModelTasks, spec: PointSpec, point: Point, keep: tuple[str, ...]
    ) -> Point:
        calibration = None
        if spec.method in CALIBRATED:
            task = tasks.evaluate(spec.sampler, spec.granularity, keep, "calibration", spec.label)
            calibration = self._add(tasks, task)
        timed: tuple[Task, ...] = ()
        if tasks.measures_latency:
            timed = tasks.latencies(spec.sampler, spec.granularity, keep, spec.label)
        latencies = [self._add(tasks, task) for task in timed]
        return replace(
            self._evaluated(tasks, point, keep, rung=0),
            calibration_key=calibration,
            latency_key=latencies[0] if latencies else None,
            throughput_keys=tuple(latencies[1:]),
        )

    def _evaluated(
        self, tasks: ModelTasks, point: Point, keep: tuple[str, ...], *, rung: int
    ) -> Point:
        """Add the evaluation of a point at a rung; images of another rung are not made again."""
        sampler, images = SamplerSettings(**point.sampler), tasks.protocols[rung].images
        racing = len(tasks.protocols) > 1
        label = f"{point.label}, {images} images" if racing else point.label

        def at(rung: int, continues: str | None = None) -> Task:
            return tasks.evaluate(
                sampler, point.granularity, keep, "test", label, rung=rung, continues=continues
            )

        higher = (at(above).key for above in range(rung + 1, len(tasks.protocols)))
        known = next((key for key in higher if key in self.records), None)  # of an earlier run
        task = at(rung, known or point.evaluate_key)
        if known is not None:  # it may be no part of this plan: nobody has to run it first
            task = replace(task, needs=tuple(need for need in task.needs if need != known))
        lower = () if point.evaluate_key is None else (*point.lower_keys, point.evaluate_key)
        return replace(point, evaluate_key=self._add(tasks, task), lower_keys=lower, images=images)

    def _race(self, tasks: ModelTasks, points: Sequence[Point], rung: int) -> list[Point]:
        """Let points race at a rung; those that are kept are evaluated at the next one."""
        runners = {p.key: p for p in points if self._runs(p)}
        if not runners:
            return list(points)
        timed = tasks.sweep.objective.speed == "latency" and tasks.measures_latency
        open_keys = (key for p in runners.values() for key in self._awaited(p, timed))
        awaited = tuple(dict.fromkeys(open_keys))
        if awaited:
            key = self._add_unresolved_race(tasks, rung, awaited)
        else:
            found = candidates_of(
                list(runners.values()),
                points,
                self.records,
                by_latency=timed,
                metrics=tasks.protocol.metrics,
            )
            key = self._add(tasks, tasks.race(rung, found))
        return [self._after_race(tasks, p, rung, key) if p.key in runners else p for p in points]

    def _after_race(self, tasks: ModelTasks, point: Point, rung: int, race: str) -> Point:
        point = replace(point, race_keys=(*point.race_keys, race))
        if race not in self.records or point.keep is None or point.evaluate_key is None:
            return point
        lost = self.records[race].outputs["dropped"].get(point.evaluate_key)
        if lost is not None:
            return replace(point, dropped=Dropped(images=lost["images"], by=lost["by"]))
        return self._evaluated(tasks, point, point.keep, rung=rung + 1)

    def _runs(self, point: Point) -> bool:
        """Whether a point is in the race: it exists, was not dropped, and its images were scored.

        A latency that failed does not count: it leaves the speed unknown, which keeps the point.
        """
        gone = point.error is not None or point.dropped is not None
        return not gone and not any(map(self._is_dead, _scored_by(point)))

    def _is_dead(self, key: str) -> bool:
        """Whether a task failed, or waits for one that did."""
        if key in self.failed:
            return True
        known = self.tasks.get(key)
        open_needs = () if known is None or known.state == "cached" else known.needs
        return any(map(self._is_dead, open_needs))

    def _awaited(self, point: Point, timed: bool) -> tuple[str, ...]:
        """Return what a race has to wait for: tasks it looks at that are neither done nor dead.

        timed: whether it looks at measured speeds.
        """
        latency = point.latency_key if timed else None
        if latency is not None and self._is_dead(latency):
            latency = None
        keys = (*_scored_by(point), *([] if latency is None else [latency]))
        return tuple(key for key in keys if key not in self.records)

    def _add_unresolved_race(self, tasks: ModelTasks, rung: int, needs: tuple[str, ...]) -> str:
        """List a race under a key of its own, until everything it looks at is measured."""
        protocol = tasks.protocols[rung]
        key = content_key({"kind": "race", "model": tasks.model.name, "protocol": protocol.hash})
        self.tasks[key] = PlannedTask(
            key=key,
            kind="race",
            model=tasks.model.name,
            label=f"{tasks.model.name}: race at {protocol.images} images",
            needs=needs,
            state="unresolved",
        )
        return key

    def _add_placeholders(self, tasks: ModelTasks, spec: PointSpec, point: Point) -> None:
        """List the tasks a point will need, under keys of their own, until its gates are known."""
        kinds: list[tuple[TaskKind, str]] = [("evaluate", spec.label)]
        if spec.method in CALIBRATED:
            kinds.append(("evaluate", f"{spec.label}, calibration"))
        if tasks.measures_latency:
            kinds += [("latency", label) for label in tasks.latency_labels(spec.label)]
        for kind, label in kinds:
            key = content_key({"kind": kind, "label": label, "point": point.key})
            self.tasks[key] = PlannedTask(
                key=key,
                kind=kind,
                model=tasks.model.name,
                label=f"{tasks.model.name}: {label}",
                needs=point.needs,
                state="unresolved",
            )

    def _add(self, tasks: ModelTasks, task: Task) -> str:
        if task.key not in self.tasks:
            self.tasks[task.key] = PlannedTask(
                key=task.key,
                kind=task.kind,
                model=tasks.model.name,
                label=task.label,
                needs=task.needs,
                state=self._state(task),
                task=task,
            )
        return task.key

    def _state(self, task: Task) -> TaskState:
        if task.key in self.records:
            return "cached"
        return "ready" if all(need in self.records for need in task.needs) else "waiting"


def _unresolved_point(tasks: ModelTasks, spec: PointSpec) -> Point:
    """Return what is known of a point before any record is."""
    model = tasks.model
    reference_key = tasks.reference("test").key
    search_key = None if spec.search is None else tasks.search(spec.search).key
    identity = {
        "model": model.name,
        "reference": reference_key,
        "protocol": tasks.protocol_hash,
        "method": spec.method,
        "sampler": spec.sampler.to_json(),
        "granularity": spec.granularity,
        "search": search_key,
        "target": spec.target,
        "variant": spec.variant,
        "postprocess": model.postprocess,
        "macs_convention": tasks.sweep.macs_convention,
    }
    searched: SearchSettings | None = spec.search if spec.method == "search" else None
    return Point(
        key=content_key(identity),
        model=model.name,
        model_id=model.settings.id,
        method=spec.method,
        strategy=searched.strategy if searched else None,
        loss=searched.loss.to_json() if searched else None,
        search=searched.to_json() if searched else None,
        sampler=spec.sampler.to_json(),
        sampler_dense=model.sampler.to_json(),
        granularity=spec.granularity,
        target=spec.target,
        seed=spec.seed,
        variant=spec.variant,
        protocol_hash=tasks.protocol_hash,
        reference_key=reference_key,
        statistics_keys=tuple(task.key for task in tasks.statistics.values()),
        search_key=search_key,
        needs=(reference_key,) if search_key is None else (reference_key, search_key),
        label=spec.label,
    )


def _scored_by(point: Point) -> tuple[str, ...]:
    """Return the tasks behind the scores that a race compares, and the races before it."""
    keys = (point.evaluate_key, point.calibration_key)
    return (*point.needs, *(key for key in keys if key is not None), *point.race_keys)


def resolve_gates(
    tasks: ModelTasks, spec: PointSpec, reference: Record, search: Record | None
) -> Resolution:
    """Return the gates of a point from the records they follow from, or why there are none."""
    graph = BlockGraph.from_json(reference.outputs["graphs"][spec.granularity])
    outcome = None if search is None else SearchOutcome.from_json(search.outputs["outcome"])
    try:
        gates = gates_of(spec, tasks.model, graph, outcome, tasks.sweep.macs_convention)
    except TargetError as error:
        return Resolution(error=str(error))
    return Resolution(keep=tuple(gates.to_strings()))
