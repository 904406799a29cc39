"""How well eight slots are used by a DAG of tasks that wait, and by Tune with a trial a task."""

from __future__ import annotations

import heapq
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from made_up import Waits, made_up_facts, made_up_sweep

from orchestrator.background import BackgroundTracker
from orchestrator.driver import run_sweep
from orchestrator.executors.ray_tune.run import RayTuneExecutor
from orchestrator.publish import Publisher
from orchestrator.store import open_store
from orchestrator.tracking import Entry, MlflowTracker, NullTracker, SweepRun, Tracker

SLOTS = 8
#: Tasks that a search leads to: shard and score, of the test and of the calibration prompts.
CHAIN, CHAINS = 2, 2


@dataclass(frozen=True)
class Used:
    """One run. makespan: from the first task's start to the last one's end, in seconds.

    ideal: the same tasks with no overhead, longest path first. wall: with start and report.
    """

    tasks: int
    seconds: float
    makespan: float
    ideal: float
    wall: float

    @property
    def share(self) -> float:
        return self.ideal / self.makespan

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "share": self.share}


def ideal_makespan(searches: int, seconds: float, slots: int) -> float:
    """Return how long list scheduling takes without overhead, longest path to the end first.

    Every search leads to `CHAINS` chains of `CHAIN` tasks; two more score the dense run.
    """
    depth = 1 + CHAIN
    ready = [(-depth, i) for i in range(searches)] + [(-1, searches), (-1, searches + 1)]
    heapq.heapify(ready)
    running: list[tuple[float, int]] = []
    now, number = 0.0, searches + 2
    while ready or running:
        while ready and len(running) < slots:
            heapq.heappush(running, (now + seconds, -heapq.heappop(ready)[0]))
        now, left = heapq.heappop(running)
        for _ in range(CHAINS if left == depth else 1 if left > 1 else 0):
            number += 1
            heapq.heappush(ready, (-(left - 1), number))
    return now


def run_dag(searches: int, seconds: float, tracker: Tracker, folder: Path) -> Used:
    """Run the DAG through the real driver, executor, store and publisher."""
    folder.mkdir(parents=True)
    sweep = made_up_sweep(
        "waits", models=1, weights=searches, targets=(0.5,), storage=str(folder / "store")
    )
    store, log = open_store(sweep.storage), folder / "log"
    publisher = Publisher(sweep, store, BackgroundTracker(tracker))
    began = time.perf_counter()
    result = run_sweep(
        sweep,
        store,
        RayTuneExecutor(num_cpus=SLOTS),
        publisher,
        run_task=Waits(seconds, log),
        facts=made_up_facts(sweep),
    )
    assert not result.failed and not result.skipped, result
    return _used(log, searches, seconds, time.perf_counter() - began)


def _used(log: Path, searches: int, seconds: float, wall: float) -> Used:
    spans = [json.loads(line) for line in log.read_text().splitlines()]
    makespan = max(s["ended"] for s in spans) - min(s["began"] for s in spans)
    ideal = ideal_makespan(searches, seconds, SLOTS)
    return Used(tasks=len(spans), seconds=seconds, makespan=makespan, ideal=ideal, wall=wall)


def run_tune(tasks: int, seconds: float, folder: Path) -> Used:
    """Run as many waits as trials of Tune, as it comes; nothing waits for anything else."""
    import ray
    from ray import tune

    folder.mkdir(parents=True)
    log = folder / "log"

    def trial(config: Mapping[str, Any]) -> None:
        began = time.time()
        time.sleep(seconds)
        with log.open("a") as file:
            file.write(json.dumps({"began": began, "ended": time.time()}) + "\n")
        tune.report({"number": config["number"]})

    ray.init(address="local", num_cpus=SLOTS, include_dashboard=False, log_to_driver=False)
    began = time.perf_counter()
    try:
        tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            param_space={"number": tune.grid_search(list(range(tasks)))},
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    wall = time.perf_counter() - began
    spans = [json.loads(line) for line in log.read_text().splitlines()]
    makespan = max(s["ended"] for s in spans) - min(s["began"] for s in spans)
    ideal = -(-tasks // SLOTS) * seconds
    return Used(tasks=len(spans), seconds=seconds, makespan=makespan, ideal=ideal, wall=wall)


@dataclass
class SlowTracker:
    """A tracking server that answers after `seconds`, whatever it is asked."""

    seconds: float
    entries: int = 0

    def start(self, sweep: SweepRun) -> None:
        time.sleep(self.seconds)

    def log(self, entries: Iterable[Entry]) -> None:
        for _ in entries:
            self.entries += 1
            time.sleep(self.seconds)

    def finish(
        self,
        state: Any,
        *,
        entries: Iterable[Entry] = (),
        folder: Path | None = None,
        series: Any = None,
    ) -> None:
        self.log(entries)


def utilisation(searches: int, seconds: float) -> dict[str, Any]:
    """Run the DAG with MLflow on a sqlite file."""
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        used = run_dag(searches, seconds, MlflowTracker("waits", uri), Path(folder) / "dag")
    return used.to_json()


def plain_tune(searches: int, seconds: float) -> dict[str, Any]:
    """Run the same number of tasks as trials of Tune."""
    tasks = searches * (1 + CHAIN * CHAINS) + 2
    with tempfile.TemporaryDirectory() as folder:
        return run_tune(tasks, seconds, Path(folder) / "tune").to_json()


def tracking(searches: int, seconds: float, answers_s: float) -> dict[str, Any]:
    """Run the DAG with a tracker that takes its time, and with none, in turns."""
    slow, none = list[float](), list[float]()
    for _ in range(2):
        for times, tracker in ((none, NullTracker()), (slow, SlowTracker(answers_s))):
            with tempfile.TemporaryDirectory() as folder:
                used = run_dag(searches, seconds, tracker, Path(folder) / "dag")
            times.append(used.makespan)
    return {"answers_s": answers_s, "slow": slow, "none": none, "ratio": sum(slow) / sum(none)}


def environment(folders: Sequence[Path]) -> None:
    """Let workers import what the driver imports, one thread each."""
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, folders))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
