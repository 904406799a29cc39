"""A driver in a process of its own: a real engine and store, fourteen tasks that need no model.

    python -m tests.cluster.engine --store FOLDER --address IP:PORT --acks FILE --work FILE

`--acks`: a JSON line a task that the driver was told is done. `--work`: a JSON line whenever a
worker begins a task, makes a step of a search, or has a record written.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dipgo_core.errors import DipgoError
from orchestrator.cli.options import ExitCode
from orchestrator.cli.running import Command, exit_code, make_executor
from orchestrator.driver import run_sweep
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.store.folder import FolderBackend
from orchestrator.sweep_settings import AskedResources, Resources, SweepFile
from orchestrator.sweep_tasks import Event
from tests.cluster.slow import SlowBackend
from tests.orchestrator.tiny_sweep import Listener, tiny_facts, tiny_outputs, tiny_sweep

#: Steps of a made-up search; it keeps a checkpoint after each.
STEPS = 10


def engine_sweep(gpus: float) -> SweepFile:
    """Return a sweep of fourteen tasks, each of which asks for a share of a made-up GPU."""
    asked = AskedResources(cpus=0.5, gpus=gpus)
    kinds = {"reference": asked, "search": asked, "evaluate": asked, "score": asked}
    sweep = tiny_sweep(targets=(0.5,), metrics=("psnr",))
    (model,) = sweep.models
    calibration = replace(model.calibration, images=8)
    return replace(
        sweep,
        models=(replace(model, calibration=calibration),),
        resources=Resources(**kinds, images_per_shard=8),
    )


def note(file: Path, **facts: Any) -> None:
    """Append a line at once, whole, by whichever process."""
    line = json.dumps({**facts, "pid": os.getpid(), "at": time.time()}) + "\n"
    with file.open("a") as stream:
        stream.write(line)


@dataclass(frozen=True)
class EngineTask:
    """Runs a task for so many seconds; the record follows from the inputs alone."""

    work: Path
    seconds: float

    def __call__(self, task: Task, store: Store, *, on_progress: Any = None) -> Record:
        with store.claim(task.key):
            known = store.get_record(task.key)
            if known is not None:
                return known
            self._say("began", task)
            first = int(store.get_progress(task.key, "step") or b"0")
            for step in range(first, STEPS):
                time.sleep(self.seconds / STEPS)
                made = str(step + 1).encode()
                store.put_progress(task.key, "step", made)  # a full storage is no reason to stop
                self._say(
                    "step", task, step=step, kept=store.get_progress(task.key, "step") == made
                )
            record = Record(
                key=task.key,
                kind=task.kind,
                state="done",
                inputs=task.inputs,
                outputs=tiny_outputs(task.kind, task.inputs),
                artifacts={"sizes": store.put_artifact(task.key, "sizes", task.key.encode())},
                timings={"seconds": self.seconds, "finished": time.time()},
                attempts=tuple(task.options.get("attempts", ())),
            )
            self._say("ended", task, won=store.put_record(record))
            return record

    def _say(self, what: str, task: Task, **facts: Any) -> None:
        import ray

        node = ray.util.get_node_ip_address()
        note(self.work, what=what, key=task.key, kind=task.kind, node=node, **facts)


@dataclass(frozen=True)
class Acknowledge:
    """Writes down what the driver is told."""

    acks: Path

    def __call__(self, event: Event) -> None:
        task: Mapping[str, Any] = {} if event.task is None else {"key": event.task.key}
        if event.kind in ("planned", "done", "failed"):
            note(self.acks, what=event.kind, error=event.error, **task)


def run(options: argparse.Namespace) -> ExitCode:
    sweep = engine_sweep(options.gpus)
    folder = options.store
    store = Store(SlowBackend(FolderBackend(folder), options.slow)) if options.slow else None
    result = run_sweep(
        sweep,
        store or open_store(folder),
        make_executor(Command(Path("engine"), [], "ray", options.address)),
        Listener(),
        Acknowledge(options.acks),
        run_task=EngineTask(options.work, options.seconds),
        facts=tiny_facts(sweep),
    )
    return exit_code(result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", required=True)
    parser.add_argument("--address", required=True)
    parser.add_argument("--acks", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--gpus", type=float, default=1.0)
    parser.add_argument("--slow", type=float, default=0.0, help="seconds of a storage operation")
    try:
        code = run(parser.parse_args())
    except DipgoError as error:
        print(f"error: {error}", file=sys.stderr)
        code = ExitCode.INTERNAL
    sys.exit(code)


if __name__ == "__main__":
    main()
