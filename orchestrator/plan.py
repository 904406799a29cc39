"""From a sweep and the records there are to tasks and points. Pure: no torch, no files."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from orchestrator.facts import ModelFacts
from orchestrator.model_plan import ModelPlan
from orchestrator.model_tasks import ModelTasks
from orchestrator.planned import Plan, PlannedTask
from orchestrator.point_gates import Memo
from orchestrator.records import Record
from orchestrator.resources import with_latency_resources
from orchestrator.sweep_settings import SweepFile


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
    memo: pass the same one again to plan anew without selecting gates again (see `Planner`).
    """
    return Planner(sweep, facts=facts, device=device, memo=memo).plan(records, failed=failed)


class Planner:
    """Plans one sweep again and again, as records land.

    Tasks are made once. Only the models are worked out anew that something landed or failed of.
    """

    def __init__(
        self,
        sweep: SweepFile,
        *,
        facts: Mapping[str, ModelFacts],
        device: str,
        memo: Memo | None = None,
    ) -> None:
        settled = with_latency_resources(sweep, facts)
        self._makers = {
            model.name: ModelTasks(
                sweep=settled, model=model, facts=facts[model.name], device=device
            )
            for model in sweep.models
        }
        self._memo: Memo = {} if memo is None else memo
        self._parts: dict[str, Plan] = {}

    def plan(
        self,
        records: Mapping[str, Record],
        *,
        failed: Collection[str] = (),
        changed: Collection[str] | None = None,
    ) -> Plan:
        """Return the plan of the whole sweep.

        failed: as for `build_plan`. changed: keys of tasks that landed or failed since the last
        call; None: any may have.
        """
        for name, maker in self._makers.items():
            if changed is None or self._knows(name, changed):
                builder = ModelPlan(maker, records, self._memo, failed)
                self._parts[name] = builder.plan()
        return _joined(tuple(self._parts[name] for name in self._makers))

    def _knows(self, name: str, keys: Collection[str]) -> bool:
        """Whether one of these tasks is part of a model."""
        if name not in self._parts:
            return True
        wanted = frozenset(keys)
        return any(task.key in wanted for task in self._parts[name].tasks)


def _joined(parts: Sequence[Plan]) -> Plan:
    """Return the plans of several models as one; what they share is listed once."""
    tasks: dict[str, PlannedTask] = {}
    for part in parts:
        for task in part.tasks:
            tasks.setdefault(task.key, task)
    return Plan(
        models=tuple(name for part in parts for name in part.models),
        tasks=tuple(tasks.values()),
        points=tuple(point for part in parts for point in part.points),
        protocols={digest: one for part in parts for digest, one in part.protocols.items()},
        searches=tuple(dict.fromkeys(key for part in parts for key in part.searches)),
        memory=tuple(row for part in parts for row in part.memory),
        resources=tuple(row for part in parts for row in part.resources),
        left_out=tuple(line for part in parts for line in part.left_out),
    )
