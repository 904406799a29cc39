"""`status`: what is done, who runs it, and what failed, with all that helps to find out why."""

from __future__ import annotations

from collections import Counter
from typing import Any

from orchestrator.budget import spent_gpu_hours
from orchestrator.cli.running import Command
from orchestrator.cli.show import print_table, say
from orchestrator.cli.sweeps import Results
from orchestrator.cli.tables import KINDS
from orchestrator.failures import MEANING
from orchestrator.planned import PlannedTask
from orchestrator.store import Store


def status_json(results: Results, command: Command) -> dict[str, Any]:
    """Return what is done, what is not, and every failure that still stands.

    command: what was typed; each failure tells the one that tries it again.
    """
    tasks, store = results.plan.tasks, results.store
    failed = store.failed_keys()
    failures = [
        {**_failure_json(task, store), "retry": command.line("retry", task.key[:12])}
        for task in tasks
        if task.state != "cached" and task.key in failed
    ]
    runner = store.runner(results.sweep.name)
    done = Counter(str(task.kind) for task in tasks if task.state == "cached")
    return {
        "sweep": results.sweep.name,
        "storage": store.url,
        "runner": None if runner is None else str(runner),
        "gpu_hours": spent_gpu_hours(store, results.sweep.name),
        "complete": results.plan.complete,
        "tasks": {"total": len(tasks), "done": sum(done.values()), "failed": len(failures)},
        "kinds": {
            kind: {"total": sum(task.kind == kind for task in tasks), "done": done[kind]}
            for kind in KINDS
        },
        "points": dict(Counter(point.state for point in results.points)),
        "failures": failures,
    }


def _failure_json(task: PlannedTask, store: Store) -> dict[str, Any]:
    """Return how a task failed, with what helps to find out why."""
    failure = store.get_failure(task.key)
    about = {"key": task.key, "kind": task.kind, "label": task.label}
    if failure is None:  # it was tried again meanwhile
        return {**about, "error": "not known any more"}
    outputs = failure.outputs
    return {
        **about,
        "error": failure.error,
        "class": outputs.get("class"),
        "host": failure.host.get("hostname"),
        "log": outputs.get("log"),
        "traceback": outputs.get("traceback"),
        "attempts": list(failure.attempts),
    }


def print_status(document: dict[str, Any]) -> None:
    """Print the status document for people."""
    rows = [
        (kind, f"{count['done']}", f"{count['total']}") for kind, count in document["kinds"].items()
    ]
    print_table(
        f"{document['sweep']} in {document['storage']}",
        ("tasks", "done", "in all"),
        rows,
        right=("done", "in all"),
    )
    states = ", ".join(f"{count} {state}" for state, count in sorted(document["points"].items()))
    say(f"points: {states or 'none'}{'; complete' if document['complete'] else ''}")
    traces = set[str]()
    if document["gpu_hours"]:
        say(f"spent: {document['gpu_hours']:.2f} GPU-hours")
    if document["runner"]:
        say(f"run by {document['runner']}")
    for failure in document["failures"]:
        _print_failure(failure, traces)


def _print_failure(failure: dict[str, Any], traces: set[str]) -> None:
    """Print a failure, its trace unless it is among those shown before."""
    kind = failure.get("class") or "unknown"
    say(f"failed: {failure['label']} ({failure['key'][:12]}): {failure['error']}")
    say(f"  {kind}: {MEANING.get(kind, 'not classified')}")
    for attempt in failure.get("attempts", ()):
        say(f"  before that: {attempt['failure']} on {attempt['host']}: {attempt['error']}")
    trace = failure.get("traceback") or ""
    if trace and trace not in traces:
        traces.add(trace)
        say("\n".join(f"  {line}" for line in trace.rstrip().splitlines()))
    if failure.get("log"):
        say(f"  log: {failure['log']}")
    say(f"  to try it again: {failure['retry']}")
