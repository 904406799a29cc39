"""The part of a plan that is one model's: its tasks and points, from the records there are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from dipgo_core.config import SamplerSettings, SearchSettings
from dipgo_core.evaluation.protocol import Split
from dipgo_core.graph import BlockGraph
from dipgo_core.outcome import SearchOutcome
from orchestrator.explore import Explored, Growing, expected_images, explored_points
from orchestrator.methods import (
    CALIBRATED,
    STEP_MASKS,
    PointSpec,
    left_out,
    searched_target,
    searches,
)
from orchestrator.model_tasks import ModelTasks, Way
from orchestrator.planned import Dropped, Plan, PlannedTask, Point, TaskState
from orchestrator.point_gates import Memo, Resolution, resolve_gates, unresolved_point
from orchestrator.records import Record, Task, TaskKind, content_key
from orchestrator.resources import resource_rows
from orchestrator.rungs import candidates_of
from orchestrator.sweep_settings import ResourceKind

_KINDS: tuple[ResourceKind, ...] = ("reference", "search", "evaluate", "latency", "score")


class ModelPlan:
    """Collects the tasks and points of one model."""

    def __init__(
        self,
        maker: ModelTasks,
        records: Mapping[str, Record],
        memo: Memo,
        failed: Collection[str],
    ) -> None:
        self.maker = maker
        self.records = records
        self.memo = memo
        self.failed = failed
        self.tasks: dict[str, PlannedTask] = {}
        self.to_propose: tuple[str, ...] = ()  # what tells the points to come
        self._dead: dict[str, bool] = {}
        self._last_outcome: tuple[str, SearchOutcome] | None = None

    def plan(self) -> Plan:
        """Return the plan of this model alone."""
        maker = self.maker
        specs = self._specs()
        self._add_reference("test")
        explores = maker.model.explore is not None
        if explores or any(s.search is not None or s.method in CALIBRATED for s in specs):
            self._add_reference("calibration")
        for task in maker.statistics.values():
            self._add(task)
        found = tuple(self._add_searches())
        for spec in specs:
            if spec.method == STEP_MASKS and spec.search is not None:
                self._add_search(spec.search, searched_target(maker.model, spec))
        points = [self._add_point(spec) for spec in specs]
        explored = self._explore()
        points += explored
        found += tuple(dict.fromkeys(str(point.search_key) for point in explored))
        for rung in range(len(maker.protocols.rungs) - 1):
            points = self._race(points, rung)
        return Plan(
            models=(maker.model.name,),
            tasks=tuple(self.tasks.values()),
            points=tuple(points),
            protocols=maker.protocols.by_hash,
            searches=found,
            memory=maker.memory.rows,
            resources=resource_rows(maker.sweep, maker.model.name, _KINDS, maker.facts),
            left_out=tuple(left_out(maker.model)),
        )

    def _specs(self) -> Sequence[PointSpec]:
        """Return the points that are wanted."""
        return self.maker.specs

    # searches -----------------------------------------------------------------------------------

    def _add_searches(self) -> Iterator[str]:
        """Add the searches of the grid, each once for every target that it does not serve alone."""
        model = self.maker.model
        for settings in searches(model):
            yield from dict.fromkeys(self._add_search(settings, t) for t in model.targets)

    def _add_search(self, settings: SearchSettings, target: float | None) -> str:
        """Add a search, and what it begins with."""
        for before in self.maker.found_before(settings, target).values():
            self._add(before)
        return self._add(self.maker.search(settings, target))

    # images and their figures --------------------------------------------------------------------

    def _add_reference(self, split: Split) -> None:
        """Add the dense run of a split, and its images while nobody has put them together."""
        maker, images = self.maker, self.maker.protocols.images(split).images
        self._add_merge(
            maker.reference(split), split, images, lambda shard: maker.dense_shard(split, shard)
        )

    def _add_evaluation(self, way: Way, split: Split, label: str, *, rung: int = -1) -> str:
        """Add the figures of a gate table, and its images while they have no figures."""
        maker = self.maker
        images = (
            maker.protocols.rungs[rung].images
            if split == "test"
            else maker.protocols.calibration.images
        )
        return self._add_merge(
            maker.evaluate(way, split, label, rung=rung),
            split,
            images,
            lambda shard: maker.shard(way, split, shard, label),
        )

    def _add_merge(
        self, task: Task, split: Split, images: int, shard: Callable[[range], Task]
    ) -> str:
        if task.key in self.records:
            return self._add(task)
        return self._add(
            task.fed_by([self._add(one) for one in self._shards(split, images, shard)])
        )

    def _shards(
        self, split: Split, images: int, shard: Callable[[range], Task]
    ) -> tuple[Task, ...]:
        """Return the shards of the first images: those of an earlier run if all of them are there,
        whatever it was cut like."""
        layouts = self.maker.layouts(split, images)
        planned = tuple(map(shard, next(layouts)))
        if all(one.key in self.records for one in planned):
            return planned
        for layout in layouts:
            if all(shard(each).key in self.records for each in layout):
                return tuple(map(shard, layout))
        return planned

    # points --------------------------------------------------------------------------------------

    def _add_point(self, spec: PointSpec) -> Point:
        point = self.maker.once(("point", repr(spec)), lambda: unresolved_point(self.maker, spec))
        if all(need in self.records for need in point.needs):
            found = self._resolve(spec, point)
            point = replace(
                point, keep=found.keep, extrapolation=found.extrapolation, error=found.error
            )
        if point.keep is not None:
            return self._add_measurements(spec, point, self._way(point))
        if point.error is None:
            self._add_placeholders(spec, point)
        return point

    def _resolve(self, spec: PointSpec, point: Point) -> Resolution:
        if point.key not in self.memo:
            graph = self._graph(point.reference_key, spec.granularity)
            outcome = None if point.search_key is None else self._outcome(point.search_key)
            self.memo[point.key] = resolve_gates(self.maker, spec, graph, outcome)
        return self.memo[point.key]

    def _graph(self, reference_key: str, granularity: str) -> BlockGraph:
        def read() -> BlockGraph:
            return BlockGraph.from_json(self.records[reference_key].outputs["graphs"][granularity])

        graph: BlockGraph = self.maker.once(("graph", reference_key, granularity), read)
        return graph

    def _outcome(self, search_key: str) -> SearchOutcome:
        """Return what a search has found, the one that was asked for last at no cost."""
        known = self._last_outcome
        if known is None or known[0] != search_key:
            found = SearchOutcome.from_json(self.records[search_key].outputs["outcome"])
            known = self._last_outcome = (search_key, found)
        return known[1]

    def _add_measurements(self, spec: PointSpec, point: Point, way: Way) -> Point:
        calibration = None
        if spec.method in CALIBRATED:
            calibration = self._add_evaluation(way, "calibration", spec.label)
        timed: tuple[Task, ...] = ()
        if self.maker.measures_latency:
            timed = self.maker.latencies(way, spec.label)
        latencies = [self._add(task) for task in timed]
        return replace(
            self._evaluated(point, way, rung=0),
            calibration_key=calibration,
            latency_key=latencies[0] if latencies else None,
            throughput_keys=tuple(latencies[1:]),
        )

    def _evaluated(self, point: Point, way: Way, *, rung: int) -> Point:
        """Add the evaluation of a point at a rung; images of another rung are not made again."""
        rungs = self.maker.protocols.rungs
        images = rungs[rung].images
        label = f"{point.label}, {images} images" if len(rungs) > 1 else point.label
        key = self._add_evaluation(way, "test", label, rung=rung)
        lower = () if point.evaluate_key is None else (*point.lower_keys, point.evaluate_key)
        return replace(point, evaluate_key=key, lower_keys=lower, images=images)

    def _way(self, point: Point) -> Way:
        """Return how a point runs the model; its gates are known."""
        assert point.keep is not None
        sampler: SamplerSettings = self.maker.once(
            ("sampler of", point.key), lambda: SamplerSettings(**point.sampler)
        )
        return Way(sampler, point.granularity, point.keep, point.extrapolation)

    # explorations --------------------------------------------------------------------------------

    def _explore(self) -> tuple[Point, ...]:
        """Add the points that were proposed so far, and what is known of those to come."""
        maker = self.maker
        found = explored_points(
            maker.model,
            maker.sweep.objective.quality,
            Growing(
                records=self.records,
                proposal=maker.explore,
                add=self._add,
                add_point=self._add_explored,
                is_dead=self._is_dead,
            ),
        )
        if found.to_come:
            self.to_propose = self._next_proposal(found)
            self._foresee(found, self.to_propose)
        return found.points

    def _add_explored(self, spec: PointSpec) -> Point:
        assert spec.search is not None
        self._add_search(spec.search, spec.target)
        return self._add_point(spec)

    def _next_proposal(self, found: Explored) -> tuple[str, ...]:
        """Return the task that tells what comes next; listed under a key of its own until all that
        it goes by is there."""
        if found.proposed:
            return found.awaits
        name, known = self.maker.model.name, len(found.points)
        key = content_key({"kind": "explore", "model": name, "after": known})
        label = f"{name}: proposals from {known + 1} on"
        return (self._add_unresolved(key, "explore", label, found.awaits),)

    def _foresee(self, found: Explored, awaits: tuple[str, ...]) -> None:
        """List the tasks that points to come will need."""
        model = self.maker.model
        looked_at = round(expected_images(model))
        for number in range(len(found.points) + 1, len(found.points) + found.to_come + 1):
            spec = PointSpec(method="search", sampler=model.sampler, variant=f"explored {number}")
            point = unresolved_point(self.maker, spec)
            search = self._add_placeholder(point, "search", spec.label, awaits, looked_at)
            self._add_placeholders(spec, replace(point, needs=(search,)))

    # races ---------------------------------------------------------------------------------------

    def _race(self, points: Sequence[Point], rung: int) -> list[Point]:
        """Let points race at a rung; those that are kept are evaluated at the next one."""
        runners = {p.key: p for p in points if self._runs(p)}
        if not runners:
            return list(points)
        maker = self.maker
        timed = maker.sweep.objective.speed == "latency" and maker.measures_latency
        open_keys = (key for p in runners.values() for key in self._awaited(p, timed))
        awaited = tuple(dict.fromkeys((*open_keys, *self.to_propose)))
        if awaited:
            key = self._add_unresolved_race(rung, awaited)
        else:
            found = candidates_of(
                list(runners.values()),
                points,
                self.records,
                by_latency=timed,
                metrics=maker.protocols.top.metrics,
            )
            key = self._add(maker.race(rung, found))
        return [self._after_race(p, rung, key) if p.key in runners else p for p in points]

    def _after_race(self, point: Point, rung: int, race: str) -> Point:
        point = replace(point, race_keys=(*point.race_keys, race))
        if race not in self.records or point.keep is None or point.evaluate_key is None:
            return point
        lost = self.records[race].outputs["dropped"].get(point.evaluate_key)
        if lost is not None:
            return replace(point, dropped=Dropped(images=lost["images"], by=lost["by"]))
        return self._evaluated(point, self._way(point), rung=rung + 1)

    def _runs(self, point: Point) -> bool:
        """Whether a point is in the race: it exists, was not dropped, and its images were scored.

        A latency that failed does not count: it leaves the speed unknown, which keeps the point.
        """
        gone = point.error is not None or point.dropped is not None
        return not gone and not any(map(self._is_dead, _scored_by(point)))

    def _is_dead(self, key: str) -> bool:
        """Whether a task failed, or waits for one that did."""
        known = self.tasks.get(key)
        if key in self.failed or known is None or known.state == "cached":
            return key in self.failed
        if key not in self._dead:
            self._dead[key] = any(map(self._is_dead, known.needs))
        return self._dead[key]

    def _awaited(self, point: Point, timed: bool) -> tuple[str, ...]:
        """Return what a race has to wait for: tasks it looks at that are neither done nor dead.

        timed: whether it looks at measured speeds.
        """
        latency = point.latency_key if timed else None
        if latency is not None and self._is_dead(latency):
            latency = None
        keys = (*_scored_by(point), *([] if latency is None else [latency]))
        return tuple(key for key in keys if key not in self.records)

    def _add_unresolved_race(self, rung: int, needs: tuple[str, ...]) -> str:
        """List a race under a key of its own, until everything it looks at is measured."""
        maker = self.maker
        protocol, name = maker.protocols.rungs[rung], maker.model.name
        key = content_key({"kind": "race", "model": name, "protocol": protocol.hash})
        label = f"{name}: race at {protocol.images} images"
        return self._add_unresolved(key, "race", label, needs)

    # tasks ---------------------------------------------------------------------------------------

    def _add_placeholders(self, spec: PointSpec, point: Point) -> None:
        """List the tasks a point will need, under keys of their own, until its gates are known."""
        self._add_unresolved_evaluation(point, "test", spec.label)
        if spec.method in CALIBRATED:
            self._add_unresolved_evaluation(point, "calibration", f"{spec.label}, calibration")
        if self.maker.measures_latency:
            for label in self.maker.latency_labels(spec.label):
                self._add_placeholder(point, "latency", label, point.needs)

    def _add_unresolved_evaluation(self, point: Point, split: Split, label: str) -> None:
        protocols = self.maker.protocols
        first = protocols.rungs[0] if split == "test" else protocols.calibration
        layout = next(self.maker.layouts(split, first.images))
        shards = [
            self._add_placeholder(
                point, "images", f"{label}, images {s.start} to {s.stop - 1}", point.needs, len(s)
            )
            for s in layout
        ]
        needs = (*point.needs, *shards)
        self._add_placeholder(point, "evaluate", label, needs, first.images)

    def _add_placeholder(
        self, point: Point, kind: TaskKind, label: str, needs: tuple[str, ...], images: int = 0
    ) -> str:
        named = ("placeholder", point.key, kind, label)
        key: str = self.maker.once(
            named, lambda: content_key({"kind": kind, "label": label, "point": point.key})
        )
        expect = {"images": images, "compute": 1.0 - (point.target or 0.0)}
        return self._add_unresolved(key, kind, f"{self.maker.model.name}: {label}", needs, expect)

    def _add_unresolved(
        self,
        key: str,
        kind: TaskKind,
        label: str,
        needs: tuple[str, ...],
        expect: Mapping[str, float] | None = None,
    ) -> str:
        self.tasks[key] = PlannedTask(
            key=key,
            kind=kind,
            model=self.maker.model.name,
            label=label,
            needs=needs,
            state="unresolved",
            expect=expect or {},
        )
        return key

    def _add(self, task: Task) -> str:
        key = task.key
        if key not in self.tasks:
            self.tasks[key] = PlannedTask(
                key=key,
                kind=task.kind,
                model=self.maker.model.name,
                label=task.label,
                needs=task.needs,
                state=self._state(task),
                task=task,
            )
        return key

    def _state(self, task: Task) -> TaskState:
        if task.key in self.records:
            return "cached"
        return "ready" if all(need in self.records for need in task.needs) else "waiting"


def _scored_by(point: Point) -> tuple[str, ...]:
    """Return the tasks behind the scores that a race compares, and the races before it."""
    keys = (point.evaluate_key, point.calibration_key)
    return (*point.needs, *(key for key in keys if key is not None), *point.race_keys)
