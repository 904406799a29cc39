"""Simulated against real wall time: one sweep calibrates, another one is predicted before it runs.

    python benchmarks/simulate.py record FOLDER    run both sweeps, side by side, in FOLDER
    python benchmarks/simulate.py table FOLDER     predict the second; write simulate.md and .json

Both run at the same time, so whatever else the machine does slows both alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dipgo_core.evaluation.device import cpu_name
from orchestrator.driver import Outlook, look_ahead
from orchestrator.estimates import Sample
from orchestrator.jobs import Jobs
from orchestrator.replay import Recorded, predict, recorded_jobs
from orchestrator.simulate import Cluster
from orchestrator.store import open_store
from orchestrator.sweep_file import load_sweep

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "sweeps" / "quickstart.yaml"

RUN = "from orchestrator.cli import main; main()"

#: Of both models; ten calls as in the quickstart.
MODELS = ", ".join(
    f"{{name: {name}, id: {name}, sampler: {{scheduler: ddim, steps: 10, guidance_scale: 3.0}}}}"
    for name in ("tiny-sd", "tiny-dit")
)

#: What both differ in from the quickstart: small tasks, for a machine that does other work too.
SMALL = (
    f"models=[{MODELS}]", "search.calibration.images=4", "evaluate.metrics=[psnr, ssim]",
    "evaluate.reference=dense", "objective={speed: macs, quality: psnr}",
    "search.loss.alpha=[1.0]", "search.warmup_steps=2", 'baselines=["few_steps", "uniform"]',
)  # fmt: skip

#: What they differ in from one another: targets, searches, number of images.
SWEEPS: Mapping[str, Sequence[str]] = {
    "calibrating": (
        "targets=[0.3, 0.6]", "search.steps=8", "search.seed=[0, 1]", "evaluate.images=12",
    ),
    "predicted": (
        "targets=[0.4, 0.5, 0.7]", "search.steps=12", "search.seed=[2, 3]", "evaluate.images=16",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "table"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--executor", default="local", choices=("local", "ray"))
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    folder: Path = asked.folder.absolute()
    if asked.what == "record":
        record(folder, asked.executor, asked.workers)
    else:
        write_table(folder)


def overrides(folder: Path, name: str) -> list[str]:
    place = folder / name
    return [
        *SMALL, *SWEEPS[name], f"name={name}", f"storage={place / 'store'}",
        f"tracking.uri=sqlite:///{place / 'mlflow.db'}",
    ]  # fmt: skip


def record(folder: Path, executor: str, workers: int) -> None:
    """Plan the second sweep, then run both at once."""
    for name in SWEEPS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    outlook = outlook_of(folder, "predicted")
    planned = recorded_jobs(outlook.plan, Jobs(outlook.sweep, outlook.facts, outlook.device))
    slots = {"executor": executor, "workers": workers}
    keep(folder / "planned.json", {"jobs": planned, **slots})
    extra = ["--workers", str(workers)] if executor == "ray" else []
    running = [
        subprocess.Popen(
            [
                sys.executable, "-c", RUN, "run", str(QUICKSTART), "--executor", executor,
                *extra, *options(overrides(folder, name)),
            ],
            cwd=folder / name,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )
        for name in SWEEPS
    ]  # fmt: skip
    codes = [child.wait() for child in running]
    if any(codes):
        sys.exit(f"a sweep did not end well: exit codes {codes}")


def options(overrides: Sequence[str]) -> list[str]:
    return [word for override in overrides for word in ("-o", override)]


def outlook_of(folder: Path, name: str) -> Outlook:
    sweep = load_sweep(QUICKSTART, overrides(folder, name))
    return look_ahead(sweep, open_store(sweep.storage))


def samples_of(folder: Path, name: str) -> list[Sample]:
    """Return what all records of a finished sweep tell of time, in order."""
    outlook = outlook_of(folder, name)
    records = open_store(folder / name / "store").records()
    jobs = Jobs(outlook.sweep, outlook.facts, outlook.device)
    found = [records[key] for key in records]
    for each in found:
        if each.kind == "reference":
            jobs.efforts.learn(each)
    return sorted((Sample.of_record(r, jobs.efforts) for r in found), key=lambda s: s.finished)


def write_table(folder: Path) -> None:
    """Predict the second sweep from its plan and the records of the first."""
    planned = json.loads((folder / "planned.json").read_text(encoding="utf-8"))
    calibrating, ran = (samples_of(folder, name) for name in SWEEPS)
    workers = planned["workers"]
    data: Recorded = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        "executor": planned["executor"],
        "cluster": asdict(Cluster(nodes=1, cpus=workers, gpus=0)),
        "calibration": [sample.to_json() for sample in calibrating],
        "jobs": planned["jobs"],
        "measured": [sample.to_json() for sample in ran],
    }
    found = predict(data)
    keep(ROOT / "tests" / "orchestrator" / "data" / "two_sweeps.json", data)
    shown = {key: data[key] for key in ("machine", "executor", "cluster")}
    keep(ROOT / "benchmarks" / "simulate.json", {**shown, **asdict(found)})
    (ROOT / "benchmarks" / "simulate.md").write_text(table(data, asdict(found)), encoding="utf-8")


def table(data: Recorded, found: Mapping[str, Any]) -> str:
    """Word the comparison as Markdown."""
    rows = (
        ("tasks of the sweep that calibrates", f"{len(data['calibration'])}"),
        ("tasks of the sweep that is predicted: planned", f"{len(data['jobs'])}"),
        ("the same: done", f"{len(data['measured'])}"),
        ("wall time predicted before it ran", f"{found['predicted_s']:.0f} s"),
        ("wall time measured", f"{found['measured_s']:.0f} s"),
        ("deviation", f"{found['deviation']:+.1%}"),
    )
    lines = [f"| {what} | {value} |" for what, value in rows]
    return "\n".join(
        [
            "# Simulated against real wall time",
            "",
            f"`python benchmarks/simulate.py` on {data['machine']}, executor {data['executor']}, "
            "both sweeps at the same time beside other work.",
            "",
            "| | |",
            "|---|---|",
            *lines,
            "",
        ]
    )


def keep(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
