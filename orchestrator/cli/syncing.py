"""`sync`: everything that the store holds of a sweep, sent to the tracking server once more."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli.options import ExitCode
from orchestrator.cli.show import say
from orchestrator.cli.sweeps import open_results
from orchestrator.planned import Plan
from orchestrator.publish import Publisher
from orchestrator.store import Store
from orchestrator.sweep_tasks import RunResult
from orchestrator.tracking import MlflowTracker


def sync_and_show(file: Path, overrides: Sequence[str]) -> ExitCode:
    """Send what the tracking server lacks of a sweep; what it shows already is left alone.

    Raises:
        DipgoError: the sweep file has errors, or a driver runs the sweep, which sends it itself.
    """
    results = open_results(file, overrides)
    sweep, store = results.sweep, results.store
    tracker = MlflowTracker(sweep.tracking.experiment, sweep.tracking.uri)
    with store.lease(sweep.name):
        publisher = Publisher(sweep, store, tracker)
        publisher.start(sweep, results.plan)
        publisher.finish(as_result(results.plan, store))
    if tracker.down or tracker.missing:
        say(f"not everything could be sent to {tracker.uri}; try again later", stderr=True)
        return ExitCode.INTERNAL
    say(f"tracking: {tracker.uri} shows all that is finished")
    return ExitCode.DONE


def as_result(plan: Plan, store: Store) -> RunResult:
    """Return how the runs of a sweep have ended so far, from the store alone."""
    cached = tuple(task.key for task in plan.tasks if task.state == "cached")
    known = ((task.key, store.get_failure(task.key)) for task in plan.tasks)
    open_keys = {task.key for task in plan.tasks} - set(cached)
    failed = {key: record.error or "" for key, record in known if record and key in open_keys}
    return RunResult(
        plan=plan,
        cached=cached,
        failed=failed,
        skipped=tuple(sorted(open_keys - set(failed))),
        interrupted=bool(open_keys) and not failed,
    )
