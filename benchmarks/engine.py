"""Measure the sweep engine: what it saves, what a plan costs, how well slots are used.

    python benchmarks/engine.py [--only forwards planning long short tracking] [--small] [--write]

Each figure is a ratio within one run, or is measured in a process of its own; everything goes
through the real driver, store, executor and MLflow, with tasks that only wait where models do not
matter. `--write` keeps figures in benchmarks/engine.json and renders benchmarks/engine.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "engine"))

import forwards  # noqa: E402
import planning  # noqa: E402
import utilisation  # noqa: E402

from dipgo_core.evaluation.device import cpu_name  # noqa: E402

RESULTS: Final = HERE / "engine.json"
PAGE: Final = HERE / "engine.md"


@dataclass(frozen=True)
class Size:
    """How much is measured. Searches: of the DAG of waits, each followed by four tasks."""

    tasks: int
    long_searches: int
    long_s: float
    short_searches: int
    short_s: float
    answers_s: float
    grid: forwards.Grid


FULL: Final = Size(10_000, 16, 30.0, 64, 2.0, 1.0, forwards.FULL)
SMALL: Final = Size(200, 4, 0.2, 4, 0.1, 0.1, forwards.SMALL)


def measure_forwards(size: Size) -> Mapping[str, Any]:
    """Compare a sweep with a plain Tune grid."""
    return forwards.compare(size.grid)


def measure_planning(size: Size) -> Mapping[str, Any]:
    """Plan many tasks, run them, and plan again with all of them in the store."""
    with tempfile.TemporaryDirectory() as folder:
        storage = Path(folder) / "store"
        fresh = planning.in_own_process("plan", size.tasks, storage)
        run = planning.in_own_process("run", size.tasks, storage)
        again = planning.in_own_process("plan", size.tasks, storage)
    return {"fresh": fresh, "run": run, "again": again}


def measure_long(size: Size) -> Mapping[str, Any]:
    """Use eight slots for long tasks."""
    return utilisation.utilisation(size.long_searches, size.long_s)


def measure_short(size: Size) -> Mapping[str, Any]:
    """Use eight slots for short tasks, and the same with Tune as it comes."""
    engine = utilisation.utilisation(size.short_searches, size.short_s)
    return {"engine": engine, "tune": utilisation.plain_tune(size.short_searches, size.short_s)}


def measure_tracking(size: Size) -> Mapping[str, Any]:
    """Compare a tracker that answers slowly with none."""
    return utilisation.tracking(size.short_searches, size.short_s, size.answers_s)


PARTS: Final[Mapping[str, Callable[[Size], Mapping[str, Any]]]] = {
    "forwards": measure_forwards,
    "planning": measure_planning,
    "long": measure_long,
    "short": measure_short,
    "tracking": measure_tracking,
}


def main() -> None:
    """Measure what was asked for; keep it, or print it."""
    options = _options()
    utilisation.environment([HERE / "engine", HERE.parent])
    size = SMALL if options.small else FULL
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name in options.only or PARTS:
        found = {"machine": machine(), **PARTS[name](size)}
        print(json.dumps({name: found}, indent=1))
        known[name] = found
        if options.write:
            RESULTS.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
            PAGE.write_text(page(known), encoding="utf-8")


def machine() -> dict[str, Any]:
    """Describe this machine, and what else it is doing at this moment."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "ray": version("ray"),
        "mlflow": version("mlflow"),
        "date": date.today().isoformat(),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--small", action="store_true", help="see whether it runs")
    parser.add_argument("--write", action="store_true", help="keep the results")
    return parser.parse_args()


# page ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One figure against its goal."""

    figure: str
    value: float
    unit: str
    goal: float
    at_most: bool = True

    @property
    def reached(self) -> bool:
        return self.value <= self.goal if self.at_most else self.value >= self.goal

    def line(self) -> str:
        sign, verdict = "≤" if self.at_most else "≥", "reached" if self.reached else "missed"
        goal = f"{sign} {self.goal:g}{self.unit}"
        return f"| {self.figure} | {self.value:.3g}{self.unit} | {goal} | {verdict} |"


def rows(known: Mapping[str, Any]) -> Iterator[Row]:
    """Yield every figure that has a goal, of the parts that were measured."""
    if "forwards" in known:
        found = known["forwards"]
        trials = math.prod(len(found["grid"][axis]) for axis in ("targets", "weights", "models"))
        text = f"forwards of denoisers, against {trials} plain trials"
        yield Row(text, found["ratio"], "", 1 / 3)
    if "planning" in known:
        fresh, run, again = (known["planning"][name] for name in ("fresh", "run", "again"))
        yield Row(f"plan of {fresh['tasks']:,} tasks", fresh["seconds"], " s", 5)
        peak = max(fresh["peak_mb"], again["peak_mb"])
        yield Row("peak memory of either plan", peak, " MB", 500)
        finished = f"{run['finished']:,} finished tasks"
        yield Row(f"plan again with {finished} in the store", again["seconds"], " s", 10)
        yield Row(f"driver memory a task, slope over {finished}", run["kb_a_task"], " KB", 20)
    if "long" in known:
        yield _used(known["long"], 95)
    if "short" in known:
        yield _used(known["short"]["engine"], 85)
    if "tracking" in known:
        found = known["tracking"]
        text = f"time with a tracker that takes {found['answers_s']:g} s an answer, against none"
        yield Row(text, found["ratio"], "", 1.05)


def _used(found: Mapping[str, Any], goal: float) -> Row:
    text = f"use of {utilisation.SLOTS} slots by {found['tasks']} tasks of {found['seconds']:g} s"
    return Row(text, 100 * found["share"], " %", goal, at_most=False)


def page(known: Mapping[str, Any]) -> str:
    """Render the page."""
    lines = [
        "# The sweep engine, measured",
        "",
        "| figure | measured | goal | |",
        "|---|---|---|---|",
    ]
    lines += [row.line() for row in rows(known)]
    lines += ["", *_notes(known)]
    return "\n".join(lines) + "\n"


def _notes(known: Mapping[str, Any]) -> Iterator[str]:
    if "forwards" in known:
        yield from _forwards_notes(known["forwards"])
    if "planning" in known:
        spent = [known["planning"][name]["cpu_seconds"] for name in ("fresh", "again")]
        yield (
            f"Of processor time the plans took {spent[0]:.1f} s and {spent[1]:.1f} s. They are of "
            "four models of 28 blocks and 20 calls, with a search a weight and five targets, each "
            "in a process of its own. A finished sweep's plan lists no "
            "shards, as nothing needs them any more. The run is the driver's with tasks of no "
            "length, in its own process, shown to nobody.\n"
        )
    if "short" in known:
        yield from _tune_notes(known["short"])
    if "long" in known:
        yield (
            "Use of slots is the ideal time over the time from the first task's start to the last "
            "one's end. Ideal: list scheduling of the same tasks without overhead, longest path "
            "first. With start, report and MLflow the long run took "
            f"{known['long']['wall']:.0f} s.\n"
        )
    for name, found in known.items():
        yield f"- {name}: {_in_words(found['machine'])}"


def _forwards_notes(found: Mapping[str, Any]) -> Iterator[str]:
    same = "the same" if found["same_front"] else "DIFFERENT"
    yield f"Both have {same} fronts, figure by figure. Forwards, each of a batch of two images:\n"
    yield "| for | sweep | plain trials |\n|---|---|---|"
    for name in dict.fromkeys([*found["sweep"], *found["plain"]]):
        yield f"| {name} | {found['sweep'].get(name, 0):,} | {found['plain'].get(name, 0):,} |"
    grid = found["grid"]
    yield (
        f"\nSearches of {grid['steps']} steps, {grid['images']} test images and half as many for "
        "calibration. What is shared is the searches over the targets and the dense images over "
        "everything; evaluations are the same on both sides, so the ratio falls with longer "
        "searches and rises with more test images. The plain trials do not measure their points on "
        "calibration prompts, the sweep does.\n"
    )


def _tune_notes(found: Mapping[str, Any]) -> Iterator[str]:
    engine, tune = found["engine"], found["tune"]
    yield (
        "Ray Tune as it comes, a trial a task, with as many tasks that do not wait for each other: "
        f"{tune['makespan']:.0f} s, {100 * tune['share']:.0f} % of its ideal; the engine "
        f"{engine['makespan']:.0f} s in the same run.\n"
    )


def _in_words(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


if __name__ == "__main__":
    main()
