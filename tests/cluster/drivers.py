"""Sweeps that tests start on a cluster: the real command line, and made-up tasks."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.checker import acknowledged, check_store, labels_in, records_in
from tests.cluster.harness import Cluster
from tests.cluster.processes import ROOT, Child, start, wait_for

SWEEP = Path(__file__).with_name("sweep.yaml")
PROGRAM = "from orchestrator.cli import main; main()"
#: Both sweeps have so many: shards of images, references, a search, evaluations.
TASKS = 14
#: Decides after how many finished tasks a fault strikes.
SEED = 5


def moment(case: str, first: int = 3, last: int = 7) -> int:
    """Return after how many acknowledged tasks of fourteen the fault of a case comes."""
    return random.Random(f"{SEED} {case}").randint(first, last)


@dataclass
class RealSweep:
    """A folder in which a user runs `dipgo-sweep` on a small bundled model."""

    cluster: Cluster  # which another one may follow
    folder: Path
    overrides: Sequence[str] = ()
    runs: list[Child] = field(default_factory=list)

    @property
    def storage(self) -> Path:
        return self.folder / ".dipgo"

    @property
    def database(self) -> Path:
        return self.folder / "mlflow.db"

    def call(self, verb: str, *options: str) -> Child:
        """Start a command about the sweep."""
        self.folder.mkdir(parents=True, exist_ok=True)
        settings = [word for item in self.overrides for word in ("-o", item)]
        command = [sys.executable, "-c", PROGRAM, verb, str(SWEEP), *settings, *options]
        name = f"{verb}-{len(self.runs)}"
        child = start(name, command, self.folder / "logs", self.cluster.environment(), self.folder)
        self.runs.append(child)
        return child

    def run(self) -> Child:
        return self.call("run", "--address", self.cluster.address)

    def json(self, verb: str, *options: str, seconds: float = 90) -> Any:
        child = self.call(verb, "--json", *options)
        code = child.wait(seconds)
        assert code == 0, child.told()
        return json.loads(child.stdout())

    def acks(self) -> list[str]:
        """Return the keys that any run so far said were done."""
        runs = [child for child in self.runs if child.name.startswith("run")]
        return [key for child in runs for key in acknowledged(child.stderr(), self.storage)]

    def wait_for_acks(self, count: int, child: Child, seconds: float = 180) -> None:
        """Wait until so many tasks are acknowledged, or the run has ended."""
        wait_for(
            f"{count} tasks are done",
            lambda: child.code is not None or len(self.acks()) >= count,
            seconds,
            child.told,
        )
        assert child.code is None, f"too early an end\n{child.told()}"

    def checked(self) -> None:
        """Check that everything is done, once."""
        check_store(self.storage, self.acks())
        found = [record["kind"] for record in records_in(self.storage).values()]
        assert len(found) == TASKS, f"{len(found)} records: {found}\n{self.runs[-1].told()}"

    def key_of(self, label: str) -> str:
        return labels_in(self.storage)[label]


@dataclass
class EngineSweep:
    """A sweep of made-up tasks through the real engine."""

    cluster: Cluster  # which another one may follow
    folder: Path
    seconds: float = 1.0
    gpus: float = 1.0
    slow: float = 0.0
    storage: Path = field(init=False)
    runs: list[Child] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.storage = self.folder / "store"

    def run(self) -> Child:
        """Start a driver."""
        name = f"engine-{len(self.runs)}"
        options = {
            "store": self.storage,
            "address": self.cluster.address,
            "acks": self.folder / f"{name}.acks",
            "work": self.folder / "work",
            "seconds": self.seconds,
            "gpus": self.gpus,
            "slow": self.slow,
        }
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "tests.cluster.engine", *words]
        child = start(name, command, self.folder, self.cluster.environment(), ROOT)
        self.runs.append(child)
        return child

    def acks(self) -> list[str]:
        found = [_lines(self.folder / f"{child.name}.acks") for child in self.runs]
        return [line["key"] for lines in found for line in lines if line["what"] == "done"]

    def work(self, what: str | None = None) -> list[dict[str, Any]]:
        """Return what workers have written down, in order."""
        lines = _lines(self.folder / "work")
        return [line for line in lines if what in (None, line["what"])]

    def running(self) -> list[dict[str, Any]]:
        """Return where tasks are running now: the last beginning of each that has no end."""
        began = {line["key"]: line for line in self.work("began")}
        ended = {line["key"] for line in self.work("ended")}
        return [line for key, line in began.items() if key not in ended]

    def wait_for_acks(self, count: int, child: Child, seconds: float = 120) -> None:
        wait_for(
            f"{count} tasks are done",
            lambda: child.code is not None or len(self.acks()) >= count,
            seconds,
            lambda: f"{len(self.acks())} acks\n{child.told()}",
        )
        assert child.code is None, f"too early an end\n{child.told()}"

    def checked(self) -> None:
        """Check that everything is done, once: records, acknowledgements, work and steps."""
        check_store(self.storage, self.acks())
        found = [record["kind"] for record in records_in(self.storage).values()]
        assert len(found) == TASKS, f"{len(found)} records: {found}\n{self.runs[-1].told()}"
        ended = [line["key"] for line in self.work("ended")]
        assert sorted(ended) == sorted(set(ended)), "a task was finished twice"
        kept = [(line["key"], line["step"]) for line in self.work("step") if line["kept"]]
        assert len(kept) == len(set(kept)), "a step was made again after a checkpoint of it"


def _lines(path: Path) -> list[dict[str, Any]]:
    """Return whole JSON lines."""
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]
