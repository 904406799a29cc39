"""The section `explore`: what is read, and every error at its place, counted by hand."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from dipgo_core.errors import SweepFileError
from orchestrator.cli import main
from orchestrator.sweep_file import SweepFile, load_sweep
from orchestrator.sweep_file.explore import EXPLORABLE, RANGES, SAMPLERS
from orchestrator.sweep_settings import Dimension, Explore, ExploreStop

SMALL = "schema_version: 1\nname: small\nmodels: [tiny-sd]\ntargets: [0.5]\n"
EXPLORE = "explore: {{points: 40, over: {{{}}}}}\n"


def load(folder: Path, text: str) -> SweepFile:
    path = folder / "s.yaml"
    path.write_text(text, encoding="utf-8")
    return load_sweep(path)


def test_explore_reads_what_a_sampler_varies(tmp_path: Path) -> None:
    over = "loss.alpha: loguniform(0.1, 4), steps: int(100, 4), loss: {gamma: [true, false]}"
    text = EXPLORE.format(over.replace("int(100, 4)", "int(4, 100)"))
    (model,) = load(tmp_path, SMALL + text).models
    assert model.explore == Explore(
        points=40,
        over={
            "loss.alpha": Dimension(kind="loguniform", low=0.1, high=4.0),
            "steps": Dimension(kind="int", low=4.0, high=100.0),
            "loss.gamma": Dimension(kind="choice", choices=(True, False)),
        },
    )


def test_explore_ranges_with_the_same_end_stand_beside_each_other(tmp_path: Path) -> None:
    """YAML itself reads `1)` as a key here, and twice."""
    text = EXPLORE.format(
        "loss.alpha: uniform(0, 1), loss.tau: uniform(0, 0.5), target: uniform(0.3, 0.5)"
    )
    (model,) = load(tmp_path, SMALL + text).models
    assert model.explore is not None
    assert [(d.low, d.high) for d in model.explore.over.values()] == [(0, 1), (0, 0.5), (0.3, 0.5)]


def test_explore_of_one_model_merges_into_that_of_all(tmp_path: Path) -> None:
    text = """schema_version: 1
name: small
models: [tiny-sd, {id: tiny-dit, overrides: {explore: {points: 5}}}]
targets: [0.5]
explore:
  sampler: nsga2
  points: 10
  stop: {epsilon: 0.02, gpu_hours: 3}
  over:
    loss.alpha: loguniform(0.1, 4)
"""
    first, second = (model.explore for model in load(tmp_path, text).models)
    assert first is not None and first.stop == ExploreStop(epsilon=0.02, gpu_hours=3)
    assert second == replace(first, points=5)


@pytest.mark.parametrize(
    ("text", "issue"),
    [
        ("explore: {}", "s.yaml:5:10: explore.points: is missing; how many points to propose"),
        ("explore: {points: 4, over: 5}", "5:28: explore.over: must be a mapping of settings"),
        (EXPLORE.format("loss.alfa: [1, 2]"), "5:30: explore.over.loss.alfa: cannot be explored"),
        (EXPLORE.format("batch_size: int(1, 4)"), "batch_size: cannot be explored; what can is"),
        (EXPLORE.format("loss.alpha: loguniform(0, 4)"), "loss.alpha: needs a low end above 0"),
        (EXPLORE.format("steps: uniform(1, 4)"), "steps: is a whole number: take int(low, high)"),
        (EXPLORE.format("steps: int(0, 4)"), "steps: must be a whole number, at least 1, got 0"),
        (EXPLORE.format("loss.tau: uniform(0.1, 2)"), "at least 0 and below 1, got 2.0"),
        (EXPLORE.format("loss.tau: uniform(0.5, 0.1)"), "needs a low end below its high end"),
        (EXPLORE.format("encoder: int(1, 2)"), "encoder: is no number: give a list of values"),
        (EXPLORE.format("encoder: [attention, atention]"), "Did you mean 'attention'?"),
        (EXPLORE.format("seed: 3"), "seed: must be a list of values, or one of uniform(low, high)"),
        (EXPLORE.format("target: uniform(0.5, 0.999)"), "the first of 10 calls"),
        ("explore: {over: {seed: int(0, a: 9}}", "explore.over.seed: 'int(0' lacks its ')'"),
        (EXPLORE.format("seed: int(0, 9)") + "search: {steps: [1, 2]}", "6:9: search: has a list"),
        ("explore: {sampler: nsga2, batch: 1}", "5:34: explore.batch: must be at least 2"),
        ("explore: {sampler: cmaes}", "must be one of tpe, nsga2, random"),
    ],
)
def test_explore_issue(tmp_path: Path, text: str, issue: str) -> None:
    with pytest.raises(SweepFileError) as caught:
        load(tmp_path, SMALL + text)
    assert any(issue in str(each) for each in caught.value.errors)


@pytest.mark.parametrize(
    ("strategy", "over", "refused"),
    [
        ("auto", "effort: int(50, 500), seed: int(0, 9), target: uniform(0.3, 0.5)", ""),
        ("auto", "loss.alpha: uniform(0, 1), effort: int(50, 500)", "over.loss.alpha"),
        ("dipgo", "effort: int(50, 500), loss.alpha: uniform(0, 1)", "over.effort"),
        ("anneal", "steps: int(50, 500)", "over.steps"),
    ],
)
def test_what_the_strategy_does_not_read_is_not_explored(
    tmp_path: Path, strategy: str, over: str, refused: str
) -> None:
    text = SMALL + f"search: {{strategy: {strategy}}}\n" + EXPLORE.format(over)
    if not refused:
        assert load(tmp_path, text).models[0].explore is not None
        return
    with pytest.raises(SweepFileError) as caught:
        load(tmp_path, text)
    (error,) = caught.value.errors
    assert f"{refused} changes no search of {strategy}" in str(error)


ROOT = Path(__file__).parents[2]


def test_example_of_the_page_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "explore.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (model,) = load(tmp_path, example).models
    assert model.explore is not None and model.explore.over["target"].high == 0.8


def test_everything_that_can_be_explored_is_on_the_page() -> None:
    words = set(re.findall(r"[\w.]+", (ROOT / "docs" / "explore.md").read_text(encoding="utf-8")))
    assert {*EXPLORABLE, *SAMPLERS, *RANGES} <= words


def test_shipped_example_validates_and_plans_offline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    file = str(ROOT / "sweeps" / "explore.yaml")
    with pytest.raises(SystemExit) as ended:
        main(["plan", file, "--json", "-o", f"storage={tmp_path}"])
    assert ended.value.code == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    kinds = [task["kind"] for task in tasks]
    assert kinds.count("search") == 24 and kinds.count("explore") == 1 and "race" in kinds
