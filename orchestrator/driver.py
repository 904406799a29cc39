"""run_sweep: lease, plan, hand out tasks, plan again as records land, show the results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Event as Flag
from typing import Any

from dipgo_core.errors import DipgoError, StoreError
from dipgo_core.evaluation.device import device_name
from orchestrator.executors.base import Executor, RunTask
from orchestrator.facts import ModelFacts, known_items, refusal, with_kept_items
from orchestrator.memory import local_gpu_memory_gb, with_gpu_memory
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.point_gates import Memo
from orchestrator.preflight import Ready, as_last_run, prepare
from orchestrator.resources import latency_resources
from orchestrator.store import Store
from orchestrator.store.documents import parse_object
from orchestrator.store.lease import LeaseLost
from orchestrator.sweep_settings import SweepFile
from orchestrator.sweep_tasks import Audience, OnEvent, RunResult, SweepTasks, Watch
from orchestrator.task import run_task
from orchestrator.task.latency_process import stop_measuring

logger = logging.getLogger(__name__)

#: What reading commands on other machines need to know of the last run.
LAST_RUN = "last_run.json"


def local_device(sweep: SweepFile, facts: Mapping[str, ModelFacts]) -> str:
    """Return the name of the device that this machine would measure latencies on."""
    return device_name("cuda" if latency_resources(sweep, facts).gpus else "cpu")


def latency_device(sweep: SweepFile, facts: Mapping[str, ModelFacts], executor: Executor) -> str:
    """Return the name of the device that latencies of this sweep are keyed on in a run.

    Raises:
        TaskError: the executor has no device that fits.
    """
    if any("latency" in model.evaluate.metrics for model in sweep.models):
        return executor.latency_device(latency_resources(sweep, facts))
    return local_device(sweep, facts)


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """A sweep as it would be run: what is known of its models, and its plan.

    device: what latencies are keyed on.
    """

    sweep: SweepFile
    facts: Mapping[str, ModelFacts]
    device: str
    plan: Plan


def look_ahead(sweep: SweepFile, store: Store) -> Outlook:
    """Plan a sweep against its store, without torch and without network.

    What only the machine that ran it can know, such as its device, is taken from that run, and so
    are the commits that branches on the hub were then.

    Raises:
        PreflightError: something is missing that is needed whatever the network has.
    """
    last = _last_run(sweep, store)
    sweep, facts = as_last_run(sweep, last)
    facts = with_kept_items(facts, store.get_blob)
    device = last.get("device") or local_device(sweep, facts)
    sweep = with_gpu_memory(sweep, last.get("gpu_memory_gb") or local_gpu_memory_gb())
    records = store.records()
    memo: Memo = {}
    failed, given_up = set[str](), store.failed_keys()
    while True:  # who failed before a race decides whether there is a race, and what follows it
        plan = build_plan(sweep, records, facts=facts, device=device, memo=memo, failed=failed)
        found = {task.key for task in plan.tasks if task.state != "cached"} & given_up
        if found <= failed:
            return Outlook(sweep=sweep, facts=facts, device=device, plan=plan)
        failed |= found


def plan_sweep(sweep: SweepFile, store: Store) -> Plan:
    """Return the plan of `look_ahead`."""
    return look_ahead(sweep, store).plan


def run_sweep(
    sweep: SweepFile,
    store: Store,
    executor: Executor,
    audience: Audience,
    on_event: OnEvent = lambda event: None,
    *,
    run_task: RunTask = run_task,
    facts: Mapping[str, ModelFacts] | None = None,
    retry: Sequence[str] | None = None,
    stop: Flag | None = None,
    wait_s: float = 0.0,
) -> RunResult:
    """Run whatever of the sweep is not in the store yet; to go on after any stop, run it again.

    facts: as `gather_facts` gives them; if None they are looked up, and what a run needs checked.
    retry: do only what these keys name, and what depends on it; empty: what failed before.
    stop: once it is set nothing more is started; what runs may end.
    wait_s: how long to wait for another driver of this sweep.

    Raises:
        PreflightError: something that the run needs is missing, or does not fit on its GPU.
        StoreError: another driver runs this sweep, or the store is damaged.
        TaskError: `retry` names what there is not.
    """
    with store.lease(sweep.name, wait_s=wait_s) as lease, executor:
        store.clear_stop(sweep.name)
        last = _last_run(sweep, store)
        if facts is None:
            ready = prepare(sweep, last=last)
        else:
            ready = Ready(sweep=sweep, facts=facts, commits={})
        device = latency_device(ready.sweep, ready.facts, executor)
        memory = local_gpu_memory_gb()
        fitted = with_gpu_memory(ready.sweep, memory)
        source = SweepTasks(
            fitted,
            store,
            ready.facts,
            device,
            audience,
            on_event,
            retry=retry,
            watch=Watch(check_lease=lease.check, stop=stop or Flag()),
        )
        if source.plan.too_large:
            raise refusal(sweep, source.plan.too_large)
        _check_dense_runs(source.plan, store)
        _keep_tasks(source.plan, store)
        _write_inputs(sweep, store, ready, {"device": device, "gpu_memory_gb": memory})
        store.begin(sweep.name)
        audience.start(sweep, source.plan)
        source.announce()
        result = _run(executor, source, run_task, store, audience)
        if result.plan.complete:
            store.end(sweep.name)
        return result


def _run(
    executor: Executor, source: SweepTasks, run_task: RunTask, store: Store, audience: Audience
) -> RunResult:
    """Run until the source is finished, and show how it ended, however that is."""
    try:
        interrupted = _execute(executor, source, run_task, store)
    except LeaseLost:
        raise  # another driver shows the sweep now
    except Exception:
        source.check_lease()
        source.close()
        _show_what_is_done(source, audience)
        raise
    source.check_lease()
    source.close()
    result = source.result(interrupted)
    try:
        audience.finish(result)
    except KeyboardInterrupt:
        return replace(result, interrupted=True, unshown=True)
    return result


def _show_what_is_done(source: SweepTasks, audience: Audience) -> None:
    """Show a run that broke; that it broke matters more than what showing it runs into."""
    try:
        audience.finish(source.result(interrupted=True))
    except DipgoError as error:
        logger.warning("what is done could not be shown: %s", error)


def _execute(executor: Executor, source: SweepTasks, run_task: RunTask, store: Store) -> bool:
    """Run until the source is finished; return whether the user interrupted."""
    if source.finished:
        return False
    try:
        executor.run(source, run_task, store)
    except KeyboardInterrupt:
        return True
    finally:
        stop_measuring()
    return False


def _last_run(sweep: SweepFile, store: Store) -> dict[str, Any]:
    data = store.get_sweep_file(sweep.name, LAST_RUN)
    place = store.sweep_file_place(sweep.name, LAST_RUN)
    return {} if data is None else parse_object(data, place, f"delete {place} and run again")


def _check_dense_runs(plan: Plan, store: Store) -> None:
    """See that the images of finished dense runs are there, unless nothing is left to do.

    Raises:
        StoreError: somebody deleted the record of a shard.
    """
    records = store.records()
    done = (task.key for task in plan.tasks if task.kind == "reference" and task.state == "cached")
    for key in done if not plan.complete else ():
        for shard in records[key].outputs.get("shards", ()):
            if shard not in records:
                raise StoreError(
                    f"the dense run {key[:12]} lacks its shard {shard[:12]}, whose record is gone "
                    f"from {store.url}: `dipgo-sweep cache verify --repair` sets aside what rests "
                    "on it, the next run makes it again"
                )


def _keep_tasks(plan: Plan, store: Store) -> None:
    """Write what was done and has its specification no more: reports read it."""
    kept = store.task_keys()
    for planned in plan.tasks:
        if planned.task is not None and planned.state == "cached" and planned.key not in kept:
            store.put_task(planned.task)


def _write_inputs(sweep: SweepFile, store: Store, ready: Ready, machine: Mapping[str, Any]) -> None:
    """Keep prompts for the workers, the sweep as its file says it, and what it was resolved to.

    machine: what keys depend on of the machine that runs it.
    """
    for each in ready.facts.values():
        for items in (each.test, each.calibration):
            store.put_blob(items.blob())
    known = known_items(ready.sweep, ready.facts)
    kept = {
        "sweep.json": {**sweep.to_json(), "digest": sweep.digest},
        LAST_RUN: {**machine, "items": known, "commits": dict(ready.commits)},
    }
    for name, value in kept.items():
        store.put_sweep_file(sweep.name, name, json.dumps(value, indent=1, sort_keys=True).encode())
