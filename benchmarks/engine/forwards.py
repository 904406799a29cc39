"""What a sweep computes, against a plain Tune grid whose trials each do everything themselves."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.driver import plan_sweep, run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.pareto import SPEED_OF, pareto_fronts
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.records import Record
from orchestrator.store import open_store
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_tasks import RunResult


@dataclass(frozen=True)
class Grid:
    """Targets x weights x models, and how large everything is."""

    targets: tuple[float, ...]
    weights: tuple[float, ...]
    models: tuple[str, ...]
    steps: int
    images: int

    @property
    def trials(self) -> tuple[tuple[float, float, str], ...]:
        return tuple(itertools.product(self.targets, self.weights, self.models))


#: Bundled models and calls a run: the third is the second with another sampler.
MODELS: Mapping[str, tuple[str, int]] = {
    "tiny-sd": ("tiny-sd", 5),
    "tiny-dit": ("tiny-dit", 5),
    "tiny-dit-6": ("tiny-dit", 6),
}
FULL = Grid((0.2, 0.3, 0.4, 0.5, 0.6), (0.5, 1.0), tuple(MODELS), steps=60, images=16)
SMALL = Grid((0.4, 0.6), (0.5, 1.0), ("tiny-dit",), steps=2, images=4)


def sweep_text(grid: Grid, folder: Path) -> str:
    """Return a sweep file; JSON is YAML."""
    models = [
        {
            "name": name,
            "id": MODELS[name][0],
            "sampler": {"scheduler": "ddim", "steps": MODELS[name][1], "guidance_scale": 3.0},
        }
        for name in grid.models
    ]
    return json.dumps(
        {
            "schema_version": 1,
            "name": "forwards",
            "objective": {"speed": "macs", "quality": "psnr"},
            "models": models,
            "search": {
                "strategy": "dipgo",
                "loss": {"consistency": {"ssim": 1.0}, "alpha": list(grid.weights)},
                "steps": grid.steps,
                "batch_size": 2,
                "warmup_steps": 0,
                "query_dim": 16,
                "calibration": {"images": grid.images // 2, "batch_size": 2},
            },
            "targets": list(grid.targets),
            "baselines": [],
            "evaluate": {"images": grid.images, "metrics": ["psnr"], "batch_size": 2},
            "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
            "storage": str(folder / "store"),
        }
    )


@dataclass(frozen=True)
class Ran:
    """What a run left: every point, and the forwards of denoisers that its tasks needed."""

    points: tuple[ResolvedPoint, ...]
    forwards: Mapping[str, int]


def run_grid(grid: Grid, folder: Path) -> Ran:
    """Run a sweep through the real driver and store, in this process."""
    folder.mkdir(parents=True)
    file = folder / "sweep.yaml"
    file.write_text(sweep_text(grid, folder), encoding="utf-8")
    sweep = load_sweep(file, [])
    store = open_store(sweep.storage)
    result = run_sweep(sweep, store, InProcessExecutor(), _Silent())
    assert not result.failed, result.failed
    return results(folder)


def results(folder: Path) -> Ran:
    """Read what `run_grid` left in a folder."""
    sweep = load_sweep(folder / "sweep.yaml", [])
    store = open_store(sweep.storage)
    plan, records = plan_sweep(sweep, store), store.records()
    points = resolve_points(plan.points, records, store, quality="psnr")
    return Ran(points, forwards_of(records.values()))


def forwards_of(records: Iterable[Record]) -> dict[str, int]:
    """Return how often denoisers were called, by what for."""
    found = Counter[str]()
    for record in records:
        if record.kind in ("search", "images"):  # others merge what shards have made
            found[_purpose(record)] += int(record.outputs["forwards"])
    return dict(found)


def _purpose(record: Record) -> str:
    if record.kind == "search":
        return "search"
    if "keep" not in record.inputs:
        return "reference"
    split = record.inputs["protocol"]["split"]
    return "evaluation" if split == "test" else "calibration of points"


def plain_grid(grid: Grid, folder: Path) -> Ran:
    """Run each point as a trial of Tune that starts from nothing.

    A plain trial would not measure its point on the calibration prompts: that is not counted.
    """
    import ray
    from ray import tune

    places = {trial: folder / f"trial-{i}" for i, trial in enumerate(grid.trials)}

    def trial(config: Mapping[str, Any]) -> None:
        target, weight, model = config["point"]
        one = replace(grid, targets=(target,), weights=(weight,), models=(model,))
        run_grid(one, places[target, weight, model])
        tune.report({"done": True})

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        tune.Tuner(
            tune.with_resources(trial, {"cpu": 1}),
            tune_config=tune.TuneConfig(reuse_actors=True),
            param_space={"point": tune.grid_search(list(grid.trials))},
            run_config=tune.RunConfig(storage_path=str(folder / "tune"), verbose=0),
        ).fit()
    finally:
        ray.shutdown()
    found, total = dict[str, ResolvedPoint](), Counter[str]()
    for place in places.values():
        ran = results(place)
        found |= {point.key: point for point in ran.points}
        total.update(ran.forwards)
    del total["calibration of points"]
    return Ran(tuple(found.values()), dict(total))


def front_of(ran: Ran) -> dict[str, list[tuple[float, float]]]:
    """Return each model's front: speed-up counted in MACs, and PSNR to the dense images."""
    by_key = {point.key: point for point in ran.points}
    fronts = pareto_fronts(ran.points, speed=SPEED_OF["macs"], qualities=("psnr",))
    return {
        front.model: [
            (float(by_key[key].value("macs_speedup") or 0), float(by_key[key].value("psnr") or 0))
            for key in front.points
        ]
        for front in fronts
    }


def compare(grid: Grid) -> dict[str, Any]:
    """Run both ways and compare."""
    with tempfile.TemporaryDirectory() as folder:
        ours = run_grid(grid, Path(folder) / "sweep")
        plain = plain_grid(grid, Path(folder) / "plain")
    counts = sum(ours.forwards.values()), sum(plain.forwards.values())
    return {
        "grid": asdict(grid),
        "sweep": ours.forwards,
        "plain": plain.forwards,
        "ratio": counts[0] / counts[1],
        "front": front_of(ours),
        "same_front": front_of(ours) == front_of(plain),
    }


class _Silent:
    """An audience that shows nothing."""

    def start(self, sweep: Any, plan: Any) -> None:
        pass

    def landed(self, record: Any, task: Any) -> None:
        pass

    def finish(self, result: RunResult) -> None:
        pass
