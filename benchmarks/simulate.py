"""Simulated against real wall time: one sweep calibrates, another one is predicted before it runs.

    python benchmarks/simulate.py record FOLDER    run both sweeps, side by side, in FOLDER
    python benchmarks/simulate.py table FOLDER...  predict the second; write simulate.md and .json

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
DATA = ROOT / "tests" / "orchestrator" / "data"
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


INTRODUCTION = """\
# Simulated against real wall time

`benchmarks/simulate.py` on {machine}. Two sweeps of the bundled models ran at the same time,
beside other work on the machine. They share models and metrics, and differ in targets, searches
and numbers of images. The second one was predicted from its plan, made before it ran, and the
times of the first. Points with equal gates share their tasks, so fewer were done than planned.

| executor | tasks that calibrate | planned | done | predicted, s | measured, s | deviation |
|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("record", "table"))
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--executor", default="local", choices=("local", "ray"))
    parser.add_argument("--workers", type=int, default=1)
    asked = parser.parse_args()
    folders = [folder.absolute() for folder in asked.folders]
    if asked.what == "record":
        record(folders[0], asked.executor, asked.workers)
    else:
        write_table([recorded(folder) for folder in folders])


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


def recorded(folder: Path) -> Recorded:
    """Return both sweeps of a folder as data, kept for the test that predicts them again."""
    planned = json.loads((folder / "planned.json").read_text(encoding="utf-8"))
    calibrating, ran = (samples_of(folder, name) for name in SWEEPS)
    executor, workers = planned["executor"], planned["workers"]
    data: Recorded = {
        "machine": f"{cpu_name()}, {os.cpu_count()} cores, {platform.system()}",
        "executor": executor,
        "cluster": asdict(Cluster(nodes=1, cpus=workers, gpus=0)),
        "calibration": [sample.to_json() for sample in calibrating],
        "jobs": planned["jobs"],
        "measured": [sample.to_json() for sample in ran],
    }
    keep(DATA / f"two_sweeps_{executor}.json", data)
    return data


def write_table(pairs: Sequence[Recorded]) -> None:
    """Predict the second sweep of each pair from its plan and the records of the first."""
    found = [
        {
            "machine": data["machine"],
            "executor": data["executor"],
            "workers": data["cluster"]["cpus"],
            "calibrating_tasks": len(data["calibration"]),
            "planned_tasks": len(data["jobs"]),
            "done_tasks": len(data["measured"]),
            **asdict(predict(data)),
        }
        for data in pairs
    ]
    keep(ROOT / "benchmarks" / "simulate.json", found)
    (ROOT / "benchmarks" / "simulate.md").write_text(table(found), encoding="utf-8")


def table(found: Sequence[Mapping[str, Any]]) -> str:
    """Word the comparison as Markdown."""
    rows = [
        f"| {each['executor']}, {each['workers']} at a time | {each['calibrating_tasks']} "
        f"| {each['planned_tasks']} | {each['done_tasks']} | {each['predicted_s']:.0f} "
        f"| {each['measured_s']:.0f} | {each['deviation']:+.1%} |"
        for each in found
    ]
    return "\n".join([INTRODUCTION.format(machine=found[0]["machine"]), *rows, ""])


def keep(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, separators=(",", ":")) + "\n", encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    main()
