"""The rehearsal: flagship sweeps on shrunk models, changed only by paths, images and steps."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
#: What the rehearsal may change of a sweep file.
ALLOWED = re.compile(
    r"storage|tracking\.uri|evaluate\.scorers|(search\.calibration|evaluate)\.prompts"  # paths
    r"|models\.\d\.(id|revision)"
    r"|(search\.calibration|evaluate)\.images|models\.\d\.resolution|latency"  # images
    r"|models\.\d\.overrides\.evaluate\.images"
    r"|search\.steps|models\.\d\.sampler\.steps"  # steps
)
#: Every model to its front, by counted MACs: what one target and one baseline need.
SMALLEST = (
    "targets=[0.5]",
    "baselines=[uniform]",
    "objective.speed=macs",
    "evaluate.metrics=[kid]",
    "models.0.overrides.evaluate.metrics=[kid]",
)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rehearse", ROOT / "scripts" / "rehearse.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["rehearse"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def results(state: str = "done", disturbed: tuple[str, ...] = ()) -> dict[str, Any]:
    points = [
        {"key": key, "model": "one", "method": method, "name": method, "state": state}
        for key, method in (("a", "dense"), ("b", "uniform"), ("c", "search"))
    ]
    front = {
        "model": "one",
        "objectives": ["speedup", "kid"],
        "points": ["a"],
        "standing": {key: "surely" for key in "abc" if key not in disturbed},
        "disturbed": dict.fromkeys(disturbed, "busy"),
    }
    return {"points": points, "fronts": [front]}


WANTED = {"dense", "uniform", "search"}


def test_whole_results_pass(script: ModuleType) -> None:
    assert script.judged("one", "kid", WANTED, results()) == []


def test_point_whose_latency_was_disturbed_passes(script: ModuleType) -> None:
    assert script.judged("one", "kid", WANTED, results(disturbed=("b",))) == []


def test_unfinished_points_are_named(script: ModuleType) -> None:
    problems = script.judged("one", "kid", WANTED, results(state="failed"))
    assert problems == [f"one: {method} is failed" for method in ("dense", "uniform", "search")]


def test_method_that_is_not_on_the_front_is_named(script: ModuleType) -> None:
    problems = script.judged("one", "kid", {*WANTED, "random"}, results())
    assert problems == ["one: no random on its front of kid"]


def test_model_without_a_front_is_named(script: ModuleType) -> None:
    assert script.judged("one", "clip", WANTED, results()) == ["one: no front of clip"]


def test_only_paths_images_and_steps_are_changed(script: ModuleType, tmp_path: Path) -> None:
    for flagship in script.FLAGSHIPS:
        overrides = list(script.Stage(tmp_path).overrides(flagship))
        keys = [override.partition("=")[0] for override in overrides]
        assert [key for key in keys if not ALLOWED.fullmatch(key)] == []


def test_every_flagship_model_has_its_shrunk_one(script: ModuleType, tmp_path: Path) -> None:
    for flagship, names in script.FLAGSHIPS.items():
        command = script.Stage(tmp_path).command("validate", flagship)
        file = next(word for word in command if word.endswith(".yaml"))
        done = script.call([*command[:3], "validate", file, "--json"], stdout=subprocess.PIPE)
        assert len(json.loads(done.stdout)["models"]) == len(names)


@pytest.mark.slow
def test_transformers_reach_their_fronts(script: ModuleType, tmp_path: Path) -> None:
    flagship, stage = "transformer_family", script.Stage(tmp_path)
    script.write_stage(stage, [flagship])
    settings = [word for item in SMALLEST for word in ("-o", item)]
    command = stage.command("run", flagship, *settings, "--executor", "local")
    done = script.call(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    read = script.call(
        stage.command("pareto", flagship, *settings, "--json"), stdout=subprocess.PIPE
    )
    for model in ("dit-xl", "pixart-alpha", "sd35-medium", "flux-dev"):
        assert script.judged(model, "kid", WANTED, json.loads(read.stdout)) == []
