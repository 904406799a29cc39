"""Runs tasks on Ray Tune: one Tuner whose searcher hands out whichever task is ready.

Tune keeps no state that matters: tasks, progress and results live in the store, so its own files go
to a temporary folder of the driver and a trial's config is nothing but the task's key.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self

import ray
from ray import tune
from ray.tune.search import Searcher
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dipgo_core.errors import TaskError
from dipgo_core.evaluation.device import device_name
from orchestrator.executors.base import (
    OnProgress,
    RunTask,
    TaskSource,
    attempt,
    local_device,
)
from orchestrator.executors.placement import (
    NODE,
    Bundle,
    Node,
    bundle_of,
    declares_nodes,
    latency_nodes,
    most_common,
    narrowed,
)
from orchestrator.failures import Failure, failure_of
from orchestrator.store import Store
from orchestrator.sweep_settings import TaskResources

logger = logging.getLogger(__name__)

_PROGRESS_EVERY_S = 2.0
_STORE_MEMORY_BYTES = 128 * 2**20  # nothing but task keys travels through Ray
_STARTS = 3
_ANSWER_SECONDS = 180.0
_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",  # the new output prints a banner even when silenced
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_agent_register_timeout_ms": "60000",  # a busy machine starts Ray's agents slowly
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's snapshots of itself are never read
    "TUNE_RESULT_BUFFER_LENGTH": "0",
}


class RayTuneExecutor:
    """Runs tasks on a Ray cluster, a local one unless an address is given.

    address: of a running cluster; None: RAY_ADDRESS of the environment, else a local one.
    num_cpus: worker slots of a local cluster; None: one a CPU.
    """

    def __init__(self, address: str | None = None, num_cpus: int | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        self.num_cpus = num_cpus
        self._entered = ExitStack()
        self._connected = False
        self._latency_needs: Bundle = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the cluster, or stop the one that was started here."""
        self._connected = False
        self._entered.close()

    def latency_device(self, resources: TaskResources) -> str:
        """Ask the cluster's nodes; latency tasks go to those of one device from now on.

        Raises:
            TaskError: no node fits, or none answers.
        """
        if self.address is None and not ray.is_initialized():
            return local_device(resources)  # of the cluster that `run` will start here
        self._connect()
        nodes = latency_nodes(ray.nodes(), resources)
        devices = _devices(nodes, "cuda" if resources.gpus else "cpu")
        device = most_common(list(devices.values()))
        self._latency_needs = narrowed(nodes, devices, device)
        return device

    def run(self, source: TaskSource, run_task: RunTask, store: Store) -> None:
        """Run tasks until the source is finished.

        Raises:
            KeyboardInterrupt: the user interrupted; finished tasks are in the store.
        """
        if source.finished:
            return
        self._connect()
        with tempfile.TemporaryDirectory() as folder:
            _fit(source, run_task, store, folder, self._latency_needs)
        if not source.finished:
            raise KeyboardInterrupt

    def _connect(self) -> None:
        """Connect to the cluster, once; what is there already is used, and left as it is."""
        if self._connected:
            return
        self._entered.enter_context(_environment())
        if not ray.is_initialized():
            self._entered.callback(ray.shutdown)
            if self.address is None:
                _start_local(self.num_cpus)
            else:
                _connect(self.address)
        self._connected = True


def _start_local(num_cpus: int | None) -> None:
    """Start Ray on this machine; a busy one may need several attempts, as Ray waits only 30 s.

    Raises:
        TaskError: it does not start.
    """
    for attempt_number in range(1, _STARTS + 1):
        try:
            ray.init(
                address="local",
                num_cpus=num_cpus,
                resources={NODE: 1.0},
                include_dashboard=False,
                object_store_memory=_STORE_MEMORY_BYTES,
                **_QUIET,
            )
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            logger.warning("Ray did not start (attempt %d): %s", attempt_number, error)
            cause = error
    raise TaskError(
        f"Ray does not start on this machine: {cause}\nIs it very busy, or /tmp full? "
        "`--executor local` runs the sweep without Ray"
    ) from cause


def _connect(address: str) -> None:
    """Connect to a running cluster.

    Raises:
        TaskError: nothing answers there.
    """
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise TaskError(
            f"no Ray cluster answers at {address!r} ({error}); check --address and RAY_ADDRESS, or "
            "leave both out to run on this machine"
        ) from error


def _devices(nodes: Sequence[Node], kind: str) -> dict[str, str]:
    """Return the name of each node's device, by node id.

    Raises:
        TaskError: a node does not answer.
    """
    asked = ray.remote(device_name)
    answers = {
        node["NodeID"]: asked.options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
        ).remote(kind)
        for node in nodes
    }
    try:
        names = ray.get(list(answers.values()), timeout=_ANSWER_SECONDS)
    except ray.exceptions.RayError as error:
        raise TaskError(
            f"a node of the cluster does not say which device it has: {error}\nIs dipgo-sweep "
            "installed on all of them, in this version?"
        ) from error
    return dict(zip(answers, names, strict=True))


def _fit(
    source: TaskSource, run_task: RunTask, store: Store, folder: str, latency_needs: Bundle
) -> None:
    """Let Tune run every task that the source has."""
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(max(2, round(_cluster_cpus())))
    tuner = tune.Tuner(
        tune.with_resources(_trial(run_task, store), _resources(store, latency_needs)),
        tune_config=tune.TuneConfig(
            search_alg=_ReadyTasks(source, store), num_samples=-1, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name="tasks",
            storage_path=folder,
            verbose=0,
            callbacks=[_LostWorkers(source, store)],
        ),
    )
    tuner.fit()


def _trial(run_task: RunTask, store: Store) -> Callable[[dict[str, Any]], None]:
    """Return the function that workers run; a task's own error is a result, not a lost worker."""

    def run_one(config: dict[str, Any]) -> None:
        task = store.get_task(config["task"])
        result = attempt(task, store, run_task, _reporter())
        failure = asdict(result) if isinstance(result, Failure) else None
        tune.report({"finished": True, "failure": json.dumps(failure)})

    return run_one


def _reporter() -> OnProgress:
    """Return a progress callback that reaches the driver at most every few seconds."""
    last = 0.0

    def report(progress: Mapping[str, Any]) -> None:
        nonlocal last
        if time.monotonic() - last >= _PROGRESS_EVERY_S:
            last = time.monotonic()
            tune.report({"finished": False, "progress": dict(progress)})

    return report


def _resources(
    store: Store, latency_needs: Bundle
) -> Callable[[dict[str, Any]], tune.PlacementGroupFactory]:
    """Return what Tune asks for the resources of a trial (asked in the driver only).

    Tune keeps an idle worker only for a trial that asks for the same, so no idle worker stands in
    the way of one that must be alone.
    """
    by_node = declares_nodes(ray.nodes())

    def of_task(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        task = store.get_task(config["task"])
        bundle = bundle_of(task, ray.nodes(), latency_needs, by_node=by_node)
        return tune.PlacementGroupFactory([bundle])

    return of_task


def _cluster_cpus() -> float:
    return float(ray.cluster_resources().get("CPU", 1.0))


class _ReadyTasks(Searcher):  # type: ignore[misc]  # Tune calls only what derives from Searcher
    """Suggests the next ready task; passes results on to the source."""

    def __init__(self, source: TaskSource, store: Store) -> None:
        super().__init__(metric="finished", mode="max")
        self._source = source
        self._store = store
        self._keys: dict[str, str] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._source.finished:
            return str(Searcher.FINISHED)
        task = self._source.next_ready()
        if task is None:
            return None
        self._store.put_task(task)
        self._source.started(task.key, "")
        self._keys[trial_id] = task.key
        return {"task": task.key}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass progress on; Tune hands results over flat (``progress/<name>``)."""
        if not result.get("finished"):
            names = [name for name in result if name.startswith("progress/")]
            report = {name.removeprefix("progress/"): result[name] for name in names}
            self._source.progress(self._keys[trial_id], report)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            return  # _LostWorkers has told the source, with the reason
        key = self._keys.pop(trial_id)
        record = self._store.get_record(key)
        failure = json.loads((result or {}).get("failure", "null"))
        if failure is not None:
            self._source.failed(key, Failure(**failure))
        elif record is None:
            unseen = f"no record in {self._store.url}; can every worker reach that folder?"
            self._source.failed(key, Failure(kind="data", error=unseen))
        else:
            self._source.done(record)

    def save(self, checkpoint_path: str) -> None:
        """Keep nothing: the state is in the store."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: to go on is to plan again."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _LostWorkers(tune.Callback):  # type: ignore[misc]  # Tune calls only what derives from it
    """Tells the source of tasks whose worker died, for instance for lack of memory."""

    def __init__(self, source: TaskSource, store: Store) -> None:
        self._source = source
        self._store = store

    def on_step_begin(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._source.tick()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        task = self._store.get_task(trial.config["task"])
        cause = trial.get_error() or TaskError("the worker was lost")
        self._source.failed(task.key, replace(failure_of(cause), kind="worker_lost"))

    def __getstate__(self) -> dict[str, Any]:
        return {}


@contextmanager
def _environment() -> Iterator[None]:
    """Set what Tune reads from the environment, and keep its loggers quiet, for one run."""
    before = dict(os.environ)
    loggers = [logging.getLogger(name) for name in ("ray.tune", "ray.train", "ray.air")]
    levels = [each.level for each in loggers]
    os.environ.update({k: v for k, v in _ENVIRONMENT.items() if k not in before})
    for each in loggers:
        each.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
