"""The quickstart, much smaller, through the command line: run, resume, one more target, Ray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "sweeps" / "quickstart.yaml"
SMALL = (
    "targets=[0.5]",
    "models.0.sampler.steps=5",  # 2^4 step masks to try, and not 2^9
    "models.1.sampler.steps=5",
    "search.steps=2",
    "models.1.overrides.search.steps=2",
    "search.loss.alpha=[1.0]",
    "search.calibration={images: 4, batch_size: 4}",
    "baselines=[few_steps, uniform, best_step_mask, {random: {draws: 1}}]",
    "evaluate.images=16",
    "evaluate.batch_size=16",
    "latency={warmup: 0, max_warmup: 0, min_runs: 6, min_seconds: 0, tries: 1}",
)
REPORT = ("report.html", "pareto.png", "points.csv", "points.json", "report.md")
POINT_FIELDS = (
    *("key", "model", "method", "strategy", "loss", "sampler", "target", "pruned_ratio", "macs"),
    *("macs_speedup", "latency_ms", "speedup", "fid", "kid", "clip", "psnr", "ssim", "n_images"),
    *("seed", "state", "subnet", "gain"),
)
FRONT_FIELDS = (
    *("model", "protocol", "device", "objectives", "points", "knee", "hypervolume"),
    "reference_point",
)


@dataclass(frozen=True)
class Workplace:
    """A folder in which a user works on one sweep."""

    folder: Path
    overrides: tuple[str, ...]

    def call(self, command: str, *options: str, change: tuple[str, ...] = ()) -> str:
        """Run a command about the sweep; return its stdout."""
        settings = [word for item in (*self.overrides, *change) for word in ("-o", item)]
        return self.plain(command, str(QUICKSTART), *settings, *options)

    def plain(self, *arguments: str) -> str:
        program = "from orchestrator.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def json(self, command: str, *options: str, change: tuple[str, ...] = ()) -> Any:
        return json.loads(self.call(command, "--json", *options, change=change))

    def records(self) -> dict[str, tuple[str, int]]:
        """Kind and time of writing of every record."""
        paths = (self.folder / ".dipgo" / "records").glob("*.json")
        return {p.stem: (json.loads(p.read_text())["kind"], p.stat().st_mtime_ns) for p in paths}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, str]:
    """A finished run of both models in one process, and what it printed."""
    place = Workplace(tmp_path_factory.mktemp("local"), SMALL)
    return place, place.call("run", "--executor", "local")


def test_run_ends_with_fronts_report_and_next_commands(local: tuple[Workplace, str]) -> None:
    place, printed = local
    assert all(model in printed for model in ("tiny-sd", "tiny-dit"))
    report = place.folder / ".dipgo" / "sweeps" / "quickstart" / "report"
    for name in REPORT:
        assert (report / name).stat().st_size > 0 and str(report / name) in printed
    assert "dipgo-sweep export" in printed and "dipgo-sweep generate" in printed


def test_pareto_json_keeps_its_contract(local: tuple[Workplace, str]) -> None:
    document = local[0].json("pareto")
    assert {point["state"] for point in document["points"]} == {"done"}
    for point in document["points"]:
        assert [name for name in POINT_FIELDS if name not in point] == []
        estimated = ("fid", "kid", "clip", "psnr", "ssim", "latency_ms", "speedup")
        assert all(f"{name}{end}" in point for name in estimated for end in ("_low", "_high"))
    for front in document["fronts"]:
        assert [name for name in FRONT_FIELDS if name not in front] == []
    qualities = {(front["model"], front["objectives"][1]) for front in document["fronts"]}
    assert {(m, q) for m in ("tiny-sd", "tiny-dit") for q in ("fid", "clip")} <= qualities


def test_searched_points_keep_their_target_and_their_bar(local: tuple[Workplace, str]) -> None:
    points = {point["key"]: point for point in local[0].json("pareto")["points"]}
    searched = [point for point in points.values() if point["method"] == "search"]
    assert len(searched) == 2
    for point in searched:
        assert point["pruned_ratio"] >= point["target"]  # never above the budget of compute
        baseline = points[point["gain"]["clip"]["baseline_key"]]
        assert baseline["method"] in ("few_steps", "uniform", "best_step_mask")
        assert baseline["target"] == point["target"]


def test_run_again_computes_nothing(local: tuple[Workplace, str]) -> None:
    place, _ = local
    before = place.records()
    place.call("run", "--executor", "local")
    assert place.records() == before
    assert place.json("status")["complete"]


def test_one_more_target_computes_only_its_points(local: tuple[Workplace, str]) -> None:
    place, _ = local
    before = place.records()
    place.call("run", "--executor", "local", change=("targets=[0.5, 0.7]",))
    after = place.records()
    fresh = Counter(after[key][0] for key in after.keys() - before.keys())
    assert {key: after[key] for key in before} == before
    assert set(fresh) == {"images", "evaluate", "latency", "search"}
    assert fresh["search"] == 2  # step masks of the new target, of each model; no search again
    assert fresh["images"] == fresh["evaluate"]  # one shard a point, none of the dense run's


def test_exported_subnet_makes_an_image(local: tuple[Workplace, str]) -> None:
    place, _ = local
    place.call("export", "--model", "tiny-sd", "--target", "0.5", "--output", "subnet.json")
    prompt = ("--prompt", "a red sneaker on a navy background")
    place.plain("generate", "subnet.json", *prompt, "--compare", "--output", "image.png")
    assert (place.folder / "image.png").read_bytes().startswith(b"\x89PNG")


def test_ray_gives_the_points_of_the_in_process_run(
    local: tuple[Workplace, str], tmp_path: Path
) -> None:
    """Images come from seeds, so where a task ran must not matter."""
    one_model = (
        "models=[{name: tiny-dit, id: tiny-dit, "
        "sampler: {scheduler: ddim, steps: 5, guidance_scale: 3.0}, "
        "overrides: {search: {learning_rate: 1.5, steps: 2}}}]"
    )
    place = Workplace(tmp_path, (*SMALL, one_model))
    place.call("run", "--workers", "2")
    here, there = local[0].json("pareto"), place.json("pareto")
    wanted = {p["key"]: p["subnet"] for p in here["points"] if p["model"] == "tiny-dit"}
    assert {point["key"]: point["subnet"] for point in there["points"]} == wanted
    assert {point["state"] for point in there["points"]} == {"done"}
