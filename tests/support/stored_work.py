"""What a worker writes for one task, step by step; each step acknowledged in a file beside."""

from __future__ import annotations

import sys
from pathlib import Path

from faulty_disk import deaths

from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store

TASK = Task(kind="search", inputs={"seed": 1}, label="a search")
STEPS = ("blob", "task", "failure", "progress", "artifact", "record", "report", "lease")


def work(store: Store, version: bytes, acknowledged: Path) -> None:
    """Do every step; `version` tells old from new in what is replaced."""

    def done(step: str) -> None:
        with acknowledged.open("a") as file:
            file.write(f"{step}\n")

    store.put_blob(b"prompts")
    done("blob")
    store.put_task(TASK)
    done("task")
    store.put_failure(_record("failed", error="too bad"))
    done("failure")
    store.put_progress(TASK.key, "checkpoint", version * 1000)
    done("progress")
    digest = store.put_artifact(TASK.key, "curve.json", b"[1, 2]")
    done("artifact")
    store.put_record(_record("done", artifacts={"curve.json": digest}))
    done("record")
    store.put_sweep_file("tiny", "report/report.html", version * 1000)
    done("report")
    with store.lease("tiny") as lease:
        lease.check()
    done("lease")


def _record(state: str, **fields: object) -> Record:
    values = {"key": TASK.key, "kind": TASK.kind, "state": state, "inputs": TASK.inputs}
    return Record(**{**values, **fields})  # type: ignore[arg-type]


def killed_everywhere(top: Path) -> int:
    """Do the work over and over, killed at each write, in folders 1, 2, ... of `top`."""

    def one(number: int) -> None:
        work(open_store(top / str(number)), b"new", top / f"{number}.log")

    return deaths(one)


if __name__ == "__main__":
    print(killed_everywhere(Path(sys.argv[1])))
