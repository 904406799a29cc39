"""What a plan of many tasks costs, and what the driver keeps of each finished one."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from made_up import Waits, made_up_facts, made_up_sweep

from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.plan import build_plan
from orchestrator.records import Record, Task
from orchestrator.store import open_store
from orchestrator.sweep_settings import SweepFile
from orchestrator.sweep_tasks import RunResult

TARGETS = (0.3, 0.4, 0.5, 0.6, 0.7)
MODELS = 4
SAMPLES_EVERY = 20  # finished tasks


def sweep_of(tasks: int, storage: Path) -> SweepFile:
    """Return a sweep of about so many tasks: a search, and four tasks for each of its targets."""
    weights = max(1, round(tasks / MODELS / (1 + 4 * len(TARGETS))))
    return made_up_sweep(
        "many", models=MODELS, weights=weights, targets=TARGETS, storage=str(storage)
    )


class Silent:
    """An audience that shows nothing, and writes down the driver's memory now and then."""

    def __init__(self) -> None:
        self.finished = 0
        self.samples: list[tuple[int, int]] = []

    def start(self, sweep: SweepFile, plan: Any) -> None:
        pass

    def landed(self, record: Record, task: Task) -> None:
        self.finished += 1
        if self.finished % SAMPLES_EVERY == 0:
            self.samples.append((self.finished, resident_bytes()))

    def finish(self, result: RunResult) -> None:
        pass


def resident_bytes() -> int:
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def peak_bytes() -> int:
    """Return the most this process ever held (of ours alone, unlike getrusage after a fork)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def run_all(tasks: int, storage: Path) -> dict[str, Any]:
    """Run a sweep of made-up tasks that take no time; tell the driver's memory a finished task."""
    sweep, watch = sweep_of(tasks, storage), Silent()
    began = time.perf_counter()
    result = run_sweep(
        sweep,
        open_store(storage),
        InProcessExecutor(),
        watch,
        run_task=Waits(0.0),
        facts=made_up_facts(sweep),
    )
    seconds = time.perf_counter() - began
    counts, sizes = np.array(watch.samples, dtype=np.float64).T
    later = counts > counts[-1] / 5  # imports and first pools are no cost of a task
    slope = float(np.polyfit(counts[later], sizes[later], 1)[0])
    return {
        "finished": len(result.done),
        "failed": len(result.failed),
        "seconds": seconds,
        "kb_a_task": slope / 1000,
        "peak_mb": sizes.max() / 1e6,
    }


def plan_once(tasks: int, storage: Path) -> dict[str, Any]:
    """Plan against what the store holds; tell seconds, and the peak memory of this process."""
    sweep = sweep_of(tasks, storage)
    facts, records = made_up_facts(sweep), open_store(storage).records()
    before = resident_bytes()
    began, began_cpu = time.perf_counter(), time.process_time()
    plan = build_plan(sweep, records, facts=facts, device="none")
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    cached = sum(task.state == "cached" for task in plan.tasks)
    return {
        "tasks": len(plan.tasks),
        "cached": cached,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak_bytes() / 1e6,
        "before_mb": before / 1e6,
    }


ROOMS = {"run": run_all, "plan": plan_once}


def in_own_process(room: str, tasks: int, storage: Path) -> Mapping[str, Any]:
    """Measure in a process of its own, whose memory holds nothing else."""
    command = [sys.executable, __file__, room, str(tasks), str(storage)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("tasks", type=int)
    parser.add_argument("storage", type=Path)
    options = parser.parse_args()
    print(json.dumps(ROOMS[options.room](options.tasks, options.storage)))


if __name__ == "__main__":
    main()
