"""Explorations: the searched points of a model that a sampler proposes, batch by batch. Pure.

A task of kind `explore` proposes a batch, and its record is the truth, so the plan follows from the
records alone, in whatever order they land. A batch is proposed when every result of the ones before
is in. Results are figures on calibration prompts: nothing is chosen on the test set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dipgo_core.config import SearchSettings
from dipgo_core.strategies import TABLE_STRATEGIES, effective
from orchestrator.bars import calibration_figures, score_for
from orchestrator.hypervolume import area_above
from orchestrator.methods import STEP_MASKS, PointSpec
from orchestrator.planned import Point
from orchestrator.records import Record, Task
from orchestrator.sweep_settings import Dimension, Explore, ExploreStop, SweepModel

Records = Mapping[str, Record]
Params = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What became of one proposal. values: (MACs speed-up, quality), larger = better; None: failed.

    search: key of its search. gpu_hours: what that took, hours where it took no GPU.
    """

    params: Params
    values: tuple[float, float] | None
    search: str | None = None
    gpu_hours: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Return what a sampler is told."""
        return {"params": dict(self.params), "values": self.values and list(self.values)}


Generation = tuple[Trial, ...]


@dataclass(frozen=True, kw_only=True)
class Growing:
    """The plan of one model while it is made: what an exploration asks of it, and adds to it.

    proposal: makes the task of the next generation, given how many points it has and all before
    it. add: adds a task. add_point: adds a point with its tasks. is_dead: whether a task failed, or
    needs one that did.
    """

    records: Records
    proposal: Callable[[int, Sequence[Generation]], Task]
    add: Callable[[Task], str]
    add_point: Callable[[PointSpec], Point]
    is_dead: Callable[[str], bool]


@dataclass(frozen=True, kw_only=True)
class Explored:
    """The points known so far. to_come: how many more there may be.

    awaits: keys of tasks that have to end before it is known what comes next; none at the end.
    proposed: whether what it waits for is a task `explore`, else the results of a generation.
    """

    points: tuple[Point, ...] = ()
    to_come: int = 0
    awaits: tuple[str, ...] = ()
    proposed: bool = False


def explored_points(model: SweepModel, quality: str, plan: Growing) -> Explored:
    """Add what is known of an exploration to a plan: proposed points, and the next proposal.

    What was proposed stays, whatever is missing now of the results before it. quality: of the
    sweep's objective; its calibration figure is what samplers are told.
    """
    explore = model.explore
    points: list[Point] = []
    generations: list[Generation] = []
    awaits: dict[str, None] = {}
    while explore is not None and len(points) < explore.points:
        task = plan.proposal(min(explore.batch, explore.points - len(points)), generations)
        if task.key not in plan.records:
            return _next(explore, Explored(points=tuple(points)), generations, awaits, task, plan)
        plan.add(task)
        proposals = plan.records[task.key].outputs["points"]
        added = [plan.add_point(spec) for spec in specs_of(model, proposals, first=len(points))]
        points += added
        awaits |= dict.fromkeys(key for point in added for key in _awaited(point, plan))
        told = zip(proposals, added, strict=True)
        generations.append(tuple(_trial(params, point, quality, plan) for params, point in told))
    return Explored(points=tuple(points))


def _next(
    explore: Explore,
    known: Explored,
    generations: Sequence[Generation],
    awaits: Iterable[str],
    task: Task,
    plan: Growing,
) -> Explored:
    """Return what follows the last generation that was proposed: `task`, once all results are in,
    unless they say that it is enough."""
    left = explore.points - len(known.points)
    if waiting := tuple(awaits):
        return replace(known, to_come=left, awaits=waiting)
    if _is_over(explore, generations):
        return known
    key = plan.add(task)
    if plan.is_dead(key):
        return known
    return replace(known, to_come=left, awaits=(key,), proposed=True)


def _is_over(explore: Explore, generations: Sequence[Generation]) -> bool:
    """Whether no generation follows: nothing gained, or nothing that succeeded."""
    if generations and not any(trial.values for trial in generations[-1]):
        return True
    return explore.stop is not None and has_stalled(generations, explore.stop)


def has_stalled(generations: Sequence[Generation], stop: ExploreStop) -> bool:
    """Whether the hypervolume has grown by less than `epsilon` over the last `gpu_hours`.

    Its reference point is the dense run's speed and the worst quality of the first generation that
    succeeded, whatever comes later.
    """
    spent = list(_hours(generations))
    areas = list(_areas(generations))
    return any(
        spent[-1] - then >= stop.gpu_hours and areas[-1] <= area * (1 + stop.epsilon)
        for then, area in zip(spent[:-1], areas[:-1], strict=True)
    )


def _hours(generations: Sequence[Generation]) -> Iterator[float]:
    """Yield the GPU-hours spent after each generation; points may share a search."""
    searches: dict[str | None, float] = {}
    for generation in generations:
        searches |= {trial.search: trial.gpu_hours for trial in generation}
        yield sum(searches.values())


def _areas(generations: Sequence[Generation]) -> Iterator[float]:
    values: list[tuple[float, float]] = []
    worst: tuple[float, float] | None = None
    for generation in generations:
        values += [trial.values for trial in generation if trial.values is not None]
        if worst is None and values:
            worst = 1.0, min(quality for _, quality in values)
        yield 0.0 if worst is None else area_above(values, worst)


def dimensions(model: SweepModel) -> dict[str, Dimension]:
    """Return what is varied; of several targets one is chosen, unless they are a range."""
    assert model.explore is not None
    over = dict(model.explore.over)
    if "target" not in over and len(model.targets) > 1:
        over["target"] = Dimension(kind="choice", choices=model.targets)
    return over


def asked(model: SweepModel) -> dict[str, Any]:
    """Return what decides proposals beside results, as JSON: neither how many nor when to stop."""
    explore, over = model.explore, dimensions(model)
    assert explore is not None
    return {
        "sampler": explore.sampler,
        "batch": explore.batch,
        "seed": explore.seed,
        "over": {name: asdict(one) for name, one in over.items()},
        **({} if "target" in over else {"target": model.targets[0]}),
    }


def expected_images(model: SweepModel) -> float:
    """Return how many images a search to come looks at (`Effort`)."""
    base = model.grid.expand()[0]
    if base.strategy in TABLE_STRATEGIES:
        return _expected(model, "effort", base.effort)
    return _expected(model, "steps", base.steps) * base.batch_size


def _expected(model: SweepModel, name: str, default: float) -> float:
    """Return the value of a setting of a search to come: the mean, where it is varied."""
    known = dimensions(model).get(name)
    if known is None:
        return float(default)
    if known.kind == "choice":
        return float(sum(known.choices) / len(known.choices))
    if known.kind == "logint" and known.high > known.low:
        return float((known.high - known.low) / math.log(known.high / known.low))
    return (known.low + known.high) / 2


def specs_of(model: SweepModel, proposals: Sequence[Params], *, first: int) -> list[PointSpec]:
    """Return the points that were proposed; `first` is the number of the first of them."""
    (base, *_) = model.grid.expand()
    searches = [settings_of(base, params) for params in proposals]
    return [
        PointSpec(
            method="search",
            sampler=model.sampler,
            granularity=search.granularity,
            target=float(params.get("target", model.targets[0])),
            search=search,
            variant=f"explored {first + place + 1}",
        )
        for place, (params, search) in enumerate(zip(proposals, searches, strict=True))
    ]


def settings_of(base: SearchSettings, params: Params) -> SearchSettings:
    """Return the search of a proposal: `base`, but for what was varied."""
    own = {n: value for n, value in params.items() if "." not in n and n != "target"}
    loss = {n.removeprefix("loss."): v for n, v in params.items() if n.startswith("loss.")}
    return replace(base, loss=replace(base.loss, **loss), **own)


def _awaited(point: Point, plan: Growing) -> tuple[str, ...]:
    """Return the tasks whose results a sampler is told, and that may still come."""
    keys = _told_by(point)
    if point.error is not None or any(map(plan.is_dead, keys)):
        return ()
    return tuple(key for key in keys if key not in plan.records)


def _told_by(point: Point) -> tuple[str, ...]:
    calibration = point.calibration_key
    return (*point.needs, *([] if calibration is None else [calibration]))


def _trial(params: Params, point: Point, quality: str, plan: Growing) -> Trial:
    search = plan.records.get(str(point.search_key))
    measured = plan.records.get(str(point.calibration_key))
    score = score_for(quality, calibration_figures(measured))
    values = None
    if measured is not None and score is not None:
        values = 1.0 / (1.0 - float(measured.outputs["pruned_ratio"])), score
    hours = 0.0 if search is None else _gpu_hours(search)
    return Trial(params=params, values=values, search=point.search_key, gpu_hours=hours)


def _gpu_hours(search: Record) -> float:
    """Return what a search took, by its record alone: all attempts, on the GPUs it had."""
    seconds, gpus = search.outputs.get("seconds", 0.0), search.host.get("gpus")
    return float(seconds) * float(gpus or 1.0) / 3600


def stand_in(model: SweepModel, settings: SearchSettings) -> SearchSettings:
    """Return the search whose memory was planned for in place of an explored one.

    They differ in nothing that decides it, for that cannot be explored (`sweep_file.explore`).
    """
    if model.explore is None or settings.strategy == STEP_MASKS:
        return settings
    return effective(replace(model.grid.expand()[0], granularity=settings.granularity))
