"""A sweep judged by LPIPS, DINO distance, CMMD and ImageReward, from its file to its fronts.

Oracles: the scorers themselves on stored images, the identity of an image with itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load
from tiny_scorers import save_classifier, save_dinov2, save_image_reward

from dipgo_core.errors import PreflightError, SweepFileError
from dipgo_core.evaluation.cmmd import load_cmmd
from dipgo_core.evaluation.cmmd_distance import cmmd
from dipgo_core.evaluation.dino import dino_distances, load_dino
from dipgo_core.evaluation.lpips import load_lpips, lpips_distances
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.facts import scorer_places
from orchestrator.pareto import pareto_fronts, pareto_json
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.preflight import prepare
from orchestrator.report.tables import points_csv
from orchestrator.store import Store, open_store
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_settings import SweepFile
from tests.orchestrator.tiny_sweep import Listener
from tests.support.tiny import tiny_sd

EXTRAS = ("cmmd", "image_reward", "lpips", "dino")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep file and the scorers that it names, beside it."""
    root = tmp_path_factory.mktemp("extras")
    save_dinov2(root / "dino")
    (root / "reward").mkdir()
    save_image_reward(root / "reward")
    save_classifier(root / "alexnet.pth")
    (root / "sweep.yaml").write_text(text_of(quality="lpips"))
    return root


def text_of(
    metrics: str = "psnr, lpips, dino, cmmd, image_reward",
    quality: str = "psnr",
    more: str = "",
) -> str:
    return f"""
schema_version: 1
name: extras
models: [{{id: tiny-sd, sampler: {{scheduler: ddim, steps: 4}}}}]
search:
  steps: 2
  warmup_steps: 0
  query_dim: 8
  calibration: {{prompts: bundled:calibration, images: 2}}
targets: [0.5]
baselines: [uniform, {{few_steps: {{spacing: [leading]}}}}]
objective: {{speed: macs, quality: {quality}}}
evaluate:
  images: 10
  metrics: [{metrics}]
  scorers: {{lpips: "lpips-alex:alexnet.pth", dino: dino, image_reward: reward}}
  {more}
"""


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory) -> tuple[SweepFile, Store, Any]:
    sweep = load_sweep(folder / "sweep.yaml")
    store = open_store(tmp_path_factory.mktemp("store"))
    result = run_sweep(sweep, store, InProcessExecutor(), Listener())
    assert result.plan.complete, result.failed
    return sweep, store, result.plan


@pytest.fixture(scope="module")
def points(finished) -> Sequence[ResolvedPoint]:
    _, store, plan = finished
    return resolve_points(plan.points, store.records(), store, quality="lpips")


def test_every_point_has_every_figure_with_its_scorer(points) -> None:
    shown = [p.to_json() for p in points if p.method != "dense"]

    assert all(p[m] is not None and p[f"{m}_low"] <= p[m] for p in shown for m in EXTRAS)
    assert shown[0]["scorers"] == {
        "lpips": "lpips-alex",
        "dino": "dino",
        "cmmd": "tiny-clip",
        "image_reward": "reward",
    }


def test_scores_are_the_scorers_own_on_the_stored_images(finished, folder: Path) -> None:
    _, store, plan = finished
    record, dense = uniform_and_reference(store, plan)
    images = torch.from_numpy(arrays(store, record, "samples.safetensors")["images"])
    first = store.get_record(dense.outputs["shards"][0])
    twins = torch.from_numpy(arrays(store, first, min(first.artifacts))["images"])[: len(images)]
    scores = arrays(store, record, "per_image.safetensors")
    embeddings = arrays(store, record, "features.safetensors")["cmmd"]

    by_lpips = lpips_distances(load_lpips(f"lpips-alex:{folder / 'alexnet.pth'}"), images, twins)
    by_dino = dino_distances(load_dino(str(folder / "dino")), images, twins)

    assert scores["lpips"][: len(images)] == pytest.approx(by_lpips, rel=1e-4)
    assert scores["dino"][: len(images)] == pytest.approx(by_dino, abs=1e-6)
    assert embeddings[: len(images)] == pytest.approx(load_cmmd("tiny-clip")(images), abs=1e-5)


def test_cmmd_compares_with_the_dense_images(finished) -> None:
    _, store, plan = finished
    record, _ = uniform_and_reference(store, plan)
    dense = next(t.task for t in plan.tasks if t.task and t.kind == "statistics")
    theirs = arrays(store, store.get_record(dense.key), "features.safetensors")["cmmd"]

    ours = arrays(store, record, "features.safetensors")["cmmd"]

    assert record.outputs["metrics"]["cmmd"]["value"] == pytest.approx(cmmd(ours, theirs))


def uniform_and_reference(store: Store, plan: Any) -> tuple[Any, Any]:
    """The test-set evaluation of uniform skips, and the dense run it is compared with."""
    tasks = [t.task for t in plan.tasks if t.kind == "evaluate" and "uniform" in t.label and t.task]
    task = next(t for t in tasks if "cmmd" in t.inputs["protocol"]["metrics"])
    needed = [store.get_record(key) for key in task.needs]
    return store.get_record(task.key), next(r for r in needed if r and r.kind == "reference")


def arrays(store: Store, record: Any, name: str) -> Any:
    return load(store.get_artifact(record, name))


def test_fronts_are_drawn_for_them_and_lower_is_better(points) -> None:
    fronts = {f.objectives[1]: f for f in pareto_fronts(points, speed="macs_speedup")}

    assert set(EXTRAS) <= fronts.keys()
    text = json.loads(json.dumps(pareto_json(points, tuple(fronts.values()))))
    assert all(point["lpips"] is not None for point in text["points"] if point["target"])
    rivals = [p for p in points if p.target is not None and p.macs_speedup]
    fastest = max(rivals, key=lambda p: (p.macs_speedup, -p.value("dino")))
    assert fastest.key in fronts["dino"].points


def test_gains_are_positive_where_the_distance_is_smaller(points) -> None:
    by_key = {p.key: p for p in points}
    searched = next(p for p in points if p.method == "best_step_mask" or p.is_searched)

    gain = searched.gain["lpips"]

    rival = by_key[gain.baseline_key]
    assert gain.value == pytest.approx(rival.value("lpips") - searched.value("lpips"), abs=1e-9)
    assert set(EXTRAS) <= searched.gain.keys()


def test_bars_are_chosen_by_the_same_figure_on_calibration_prompts(points) -> None:
    measured = [p for p in points if p.target is not None]

    assert all(p.calibration_lpips is not None for p in measured)
    trivial = [p for p in measured if not p.is_searched]
    best = min(trivial, key=lambda p: p.calibration_lpips)
    searched = next(p for p in measured if p.is_searched)
    assert searched.gain["lpips"].baseline_key == best.key


def test_tables_have_columns_for_them_and_none_for_what_was_not_measured(points) -> None:
    header = points_csv(points, ())[:2000].splitlines()[0]

    assert "lpips (lpips-alex)" in header and "calibration_dino" in header
    assert "clip (" not in header and "calibration_clip" not in header


def test_dense_run_has_no_distance_to_itself(points) -> None:
    dense = next(p for p in points if p.method == "dense")

    assert dense.value("lpips") is None and dense.value("dino") is None
    assert dense.value("image_reward") is not None


def test_missing_classifier_is_refused_before_anything_runs(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    text = text_of(metrics="psnr, lpips").replace("lpips-alex:alexnet.pth", "lpips-vgg")
    (folder / "missing.yaml").write_text(text)

    with pytest.raises(PreflightError, match=r"evaluate.scorers.lpips: .*vgg16.*\(553 MB\)"):
        prepare(load_sweep(folder / "missing.yaml"))


def test_scorer_from_the_hub_is_refused_without_network(folder) -> None:
    text = text_of(metrics="psnr, dino").replace("dino: dino", f"dino: owner/dino@{'0' * 40}")
    (folder / "hub.yaml").write_text(text)

    with pytest.raises(PreflightError, match="evaluate.scorers.dino: .*owner/dino"):
        prepare(load_sweep(folder / "hub.yaml"))


def test_statistics_do_not_serve_cmmd(folder: Path) -> None:
    text = text_of("fid, cmmd", "cmmd", more="reference: {statistics: bundled}")
    (folder / "statistics.yaml").write_text(text)

    with pytest.raises(SweepFileError, match="statistics hold no CLIP embeddings"):
        load_sweep(folder / "statistics.yaml")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lpips: lpips-squeeze", "lpips-alex"),
        ("lpips: 'lpips-alex:nowhere.pth'", r"no such file: nowhere.pth \(write lpips-alex:FILE\)"),
        ("dino: nowhere", "no such folder: nowhere"),
        ("image_reward: ./nowhere", "no such folder"),
        ("squeeze: x", "squeeze"),
    ],
)
def test_wrong_scorers_are_named_with_the_rule(given: str, message: str, folder: Path) -> None:
    text = text_of(metrics="psnr")
    lines = [f"  scorers: {{{given}}}" if "scorers:" in line else line for line in text.split("\n")]
    (folder / "wrong.yaml").write_text("\n".join(lines))

    with pytest.raises(SweepFileError, match=message):
        load_sweep(folder / "wrong.yaml")


def test_a_model_without_prompts_has_no_image_reward(folder: Path) -> None:
    text = text_of(metrics="psnr, image_reward").replace(", image_reward: reward", "")
    text = text.replace("id: tiny-sd", f"id: facebook/DiT-XL-2-256, revision: '{'0' * 40}'")
    (folder / "labels.yaml").write_text(text.replace("bundled:calibration", "labels"))

    with pytest.raises(
        SweepFileError, match="image_reward means nothing for facebook/DiT-XL-2-256"
    ):
        load_sweep(folder / "labels.yaml")


def test_images_too_small_for_lpips_are_refused_before_anything_runs(folder: Path) -> None:
    tiny_sd().save_pretrained(folder / "small")  # 16 x 16
    text = text_of(metrics="psnr, lpips").replace("id: tiny-sd", "id: ./small, family: sd")
    (folder / "prompts.txt").write_text("\n".join(f"prompt {i}" for i in range(10)))
    text = text.replace("images: 10", "images: 10\n  prompts: prompts.txt")
    (folder / "small.yaml").write_text(text)

    with pytest.raises(PreflightError, match="lpips-alex needs images of 31 x 31 or more, got 16"):
        prepare(load_sweep(folder / "small.yaml"))


def test_tasks_name_scorers_that_open_from_any_folder(folder: Path, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    sweep = load_sweep("sweep.yaml")

    places = scorer_places(sweep.models[0])

    assert places["lpips"] == f"lpips-alex:{folder / 'alexnet.pth'}"
    assert places["dino"] == str(folder / "dino")
    assert places["cmmd"] == "tiny-clip"


@pytest.mark.parametrize(
    ("role", "name"), [("features", "inception-v3-compat"), ("lpips", "lpips-alex")]
)
def test_folder_named_like_a_scorer_is_not_taken_for_it(
    folder: Path, tmp_path: Path, monkeypatch, role: str, name: str
) -> None:
    (model,) = load_sweep(folder / "sweep.yaml").models
    scorers = replace(model.evaluate.scorers, **{role: name})
    evaluate = replace(model.evaluate, scorers=scorers, metrics=("fid", "lpips"))
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)

    assert scorer_places(replace(model, evaluate=evaluate))[role] == name
