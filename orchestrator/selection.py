"""Selection: some tasks of a sweep and whatever depends on them, through plan after plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence

from dipgo_core.errors import TaskError, nearest
from orchestrator.planned import Plan, PlannedTask, Point


class Selection:
    """Tasks by key. What depends on them is found anew in each plan: it may get other keys.

    A point that rests on a selected task stays selected, with every task that measures it.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = set(keys)
        self._points = set[str]()

    def tasks_of(self, plan: Plan) -> set[str]:
        """Return the keys of all open tasks of the plan that belong to the selection."""
        tasks = {task.key: task for task in plan.tasks if task.state != "cached"}
        found = _dependents(self._keys, tasks.values())
        self._points |= {point.key for point in plan.points if _rests_on(point, found)}
        measured = (p for p in plan.points if p.key in self._points)
        return _with_needs({*found, *(key for p in measured for key in p.task_keys)}, tasks)


def _rests_on(point: Point, keys: Collection[str]) -> bool:
    return any(key in keys for key in (*point.needs, *point.task_keys))


def _dependents(keys: Iterable[str], tasks: Iterable[PlannedTask]) -> set[str]:
    """Return these keys and those of all tasks that need one of them, directly or not."""
    needed_by = defaultdict[str, list[str]](list)
    for task in tasks:
        for need in task.needs:
            needed_by[need].append(task.key)
    found, stack = set[str](), list(keys)
    while stack:
        key = stack.pop()
        if key not in found:
            found.add(key)
            stack += needed_by.get(key, ())
    return found


def _with_needs(keys: Iterable[str], tasks: Mapping[str, PlannedTask]) -> set[str]:
    """Return the keys that are open tasks, and of all open tasks that they need."""
    found, stack = set[str](), list(keys)
    while stack:
        key = stack.pop()
        if key in tasks and key not in found:
            found.add(key)
            stack += tasks[key].needs
    return found


def select(plan: Plan, names: Sequence[str], failed: Collection[str]) -> Selection:
    """Return the tasks that these keys, or first characters of keys, name; without any: the failed.

    Raises:
        TaskError: a name that is no open task of the plan, or that several tasks begin with.
    """
    return Selection([_named(plan, name) for name in names] if names else failed)


def _named(plan: Plan, name: str) -> str:
    found = [task for task in plan.tasks if task.key.startswith(name)]
    if len(found) == 1 and found[0].state != "cached":
        return found[0].key
    if len(found) == 1:
        raise TaskError(f"task {name!r} ({found[0].label}) is done: there is nothing to try again")
    if found:
        labels = ", ".join(f"{task.key[:16]} ({task.label})" for task in found[:5])
        raise TaskError(f"{len(found)} tasks begin with {name!r}: {labels}; give more of the key")
    keys = [task.key[: max(12, len(name))] for task in plan.tasks]
    raise TaskError(
        f"no task of this sweep has a key that begins with {name!r}.{nearest(name, keys)} "
        "`dipgo-sweep status` lists those that failed"
    )
