"""run_task on a tiny pipeline. Oracles: the stock pipeline call, an uninterrupted search, numpy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from PIL import Image

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import DipgoError, ModelFilesError, TaskError
from dipgo_core.evaluation.device import device_name
from dipgo_core.evaluation.fid import load_extractor
from dipgo_core.evaluation.prompts import in_order
from dipgo_core.evaluation.protocol import image_seed
from dipgo_core.families import Scorers
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, load_model
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import decode
from dipgo_core.subnet import SubNet
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.facts import gather_facts
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.sweep_settings import (
    Baseline,
    Calibration,
    EvaluateSettings,
    LatencySettings,
    PromptSource,
    Reference,
    Resources,
    SearchGrid,
    SweepFile,
    SweepModel,
    Tracking,
)
from orchestrator.task import evaluate as evaluate_task
from orchestrator.task import run_task
from orchestrator.task import search as search_task
from orchestrator.task.work import loaded, packed
from tests.orchestrator.tiny_sweep import Listener
from tests.support.tiny import tiny_sd

PROMPTS = ("a red cat", "a blue dog", "a dog on the moon")
SAMPLER = SamplerSettings(scheduler="ddim", steps=4, guidance_scale=3.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny pipeline and two prompt files."""
    root = tmp_path_factory.mktemp("model")
    tiny_sd().save_pretrained(root / "model")
    (root / "test.txt").write_text("\n".join(PROMPTS))
    (root / "calibration.txt").write_text("the moon\na red moon\n")
    return root


def sweep_of(folder: Path, reference: Reference | None = None) -> SweepFile:
    def prompts(name: str) -> PromptSource:
        return PromptSource(kind="file", value=str(folder / f"{name}.txt"))

    return SweepFile(
        name="real",
        models=(
            SweepModel(
                name="tiny",
                family="sd",
                settings=ModelSettings(id=str(folder / "model")),
                sampler=SAMPLER,
                targets=(0.5,),
                baselines=(
                    Baseline(name="uniform"),
                    Baseline(name="few_steps", spacing=("leading",)),
                    Baseline(name="best_step_mask"),
                ),
                grid=SearchGrid(axes={"steps": (3,), "query_dim": (8,), "warmup_steps": (0,)}),
                calibration=Calibration(prompts=prompts("calibration"), images=2, batch_size=2),
                evaluate=EvaluateSettings(
                    prompts=prompts("test"),
                    images=5,
                    scorers=Scorers(features="tiny-features", clip=None),
                    reference=reference or Reference(),
                    metrics=("fid", "kid", "psnr", "ssim", "latency"),
                    batch_size=2,
                ),
            ),
        ),
        resources=Resources(images_per_shard=3),
        latency=LatencySettings(warmup=0, min_runs=6, min_seconds=0, tries=1),
        tracking=Tracking(experiment="real"),
    )


@pytest.fixture(scope="module")
def finished(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Plan, Mapping[str, Record]]:
    """The whole sweep, run once."""
    store = open_store(tmp_path_factory.mktemp("store"))
    loaded.cache_clear()
    result = run_sweep(sweep_of(folder), store, InProcessExecutor(), Listener())
    assert result.plan.complete, result.failed
    return store, result.plan, store.records()


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(ModelSettings(id=str(folder / "model")))


def tasks_of(plan: Plan, kind: str, label: str = "") -> list[Task]:
    return [t.task for t in plan.tasks if t.kind == kind and label in t.label and t.task]


def arrays(store: Store, record: Record, name: str) -> dict[str, Any]:
    return safetensors.numpy.load(store.get_artifact(record, name))


def stock_images(model: LoadedModel, indices: range) -> np.ndarray[Any, Any]:
    """Call the pipeline as a user would, one image at a time."""
    items = in_order([Item(prompt) for prompt in PROMPTS])
    images = []
    for i in indices:
        generator = torch.Generator().manual_seed(image_seed(0, "test", i))
        result = model.pipe(
            items[i % 3].prompt,
            num_inference_steps=4,
            guidance_scale=3.0,
            generator=generator,
            output_type="np",
        )
        images.append((result.images[0] * 255).round().astype(np.uint8).transpose(2, 0, 1))
    return np.stack(images)


def test_reference_images_are_those_of_the_stock_pipeline(finished: Any, model: Any) -> None:
    store, plan, records = finished
    record = records[tasks_of(plan, "reference", "test")[0].key]
    names = sorted(name for name in record.artifacts if name.startswith("images-"))
    images = np.concatenate([arrays(store, record, name)["images"] for name in names])
    assert names == ["images-000000.safetensors", "images-000003.safetensors"]
    difference = np.abs(images.astype(int) - stock_images(model, range(5)).astype(int))
    assert difference.max() <= 1  # batches of two against one: rounding


def test_reference_latents_decode_to_its_images(finished: Any, model: Any) -> None:
    store, plan, records = finished
    record = records[tasks_of(plan, "reference", "calibration")[0].key]
    latents = safetensors.torch.load(store.get_artifact(record, "latents.safetensors"))["latents"]
    images = arrays(store, record, "images-000000.safetensors")["images"]
    with torch.no_grad():
        decoded = decode(model, latents).numpy() * 255
    assert latents.dtype == torch.float32
    assert np.abs(decoded - images).max() <= 1


def test_search_record_serves_every_target_and_has_its_curve(finished: Any) -> None:
    store, plan, records = finished
    record = records[tasks_of(plan, "search", "dipgo")[0].key]
    curve = json.loads(store.get_artifact(record, "curve.json"))
    assert np.shape(record.outputs["outcome"]["scores"]) == (4, 10)
    assert curve["search_step"] == [1, 2, 3]
    assert record.outputs["curve"] == curve


def test_dense_evaluation_makes_no_images(finished: Any) -> None:
    _, plan, records = finished
    point = next(point for point in plan.points if point.method == "dense")
    outputs = records[str(point.evaluate_key)].outputs
    assert outputs["forwards"] == 0
    assert outputs["pruned_ratio"] == 0
    assert "psnr" not in outputs["metrics"]


def test_evaluation_keeps_per_image_scores_and_samples(finished: Any) -> None:
    store, plan, records = finished
    point = next(point for point in plan.points if point.method == "uniform")
    record = records[str(point.evaluate_key)]
    scores = arrays(store, record, "per_image.safetensors")
    assert record.outputs["metrics"]["psnr"]["value"] == pytest.approx(scores["psnr"].mean())
    assert record.outputs["metrics"]["ssim"]["n"] == 5
    assert arrays(store, record, "samples.safetensors")["images"].shape == (5, 3, 16, 16)
    assert record.outputs["pruned_ratio"] == pytest.approx(0.5)
    assert record.outputs["all_or_nothing_share"] == 1


def test_evaluated_subnet_runs_on_the_pipeline_and_gives_those_images(
    finished: Any, model: LoadedModel
) -> None:
    store, plan, records = finished
    point = next(point for point in plan.points if point.method == "search")
    record = records[str(point.evaluate_key)]
    subnet = SubNet.from_json(record.outputs["subnet"])
    with apply_subnet(model.pipe, subnet):
        images = stock_images(model, range(2))
    samples = arrays(store, record, "samples.safetensors")["images"][:2]
    assert np.abs(images.astype(int) - samples.astype(int)).max() <= 1


def test_reference_features_are_those_of_the_dense_images(finished: Any) -> None:
    store, plan, records = finished
    (task,) = tasks_of(plan, "statistics")
    reference = records[tasks_of(plan, "reference", "test")[0].key]
    names = sorted(name for name in reference.artifacts if name.startswith("images-"))
    images = np.concatenate([arrays(store, reference, name)["images"] for name in names])
    found = arrays(store, records[task.key], "features.safetensors")["features"]
    expected = load_extractor("tiny-features")(torch.from_numpy(images))
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)  # batches of two against one of 5


def test_dense_evaluation_takes_the_features_there_are(finished: Any) -> None:
    store, plan, records = finished
    point = next(point for point in plan.points if point.method == "dense")
    record = records[str(point.evaluate_key)]
    features = arrays(store, record, "features.safetensors")["features"]
    known = records[record.outputs["statistics"]["features"]]
    assert np.array_equal(features, arrays(store, known, "features.safetensors")["features"])
    assert record.outputs["metrics"]["fid"]["value"] == pytest.approx(0, abs=1e-4)
    assert record.outputs["batch_size"] == 2


def test_folder_of_real_images_is_looked_at_once(
    folder: Path, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (real := tmp_path / "real").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(real / f"{i}.png")
    sweep = sweep_of(folder, Reference(kind="folder", value=str(real)))
    store = copied(finished, tmp_path, ("reference",))
    plan = build_plan(sweep, store.records(), facts=gather_facts(sweep), device="none")
    (task,) = tasks_of(plan, "statistics")
    record = run_task(task, store)
    shutil.rmtree(real)
    dense = run_task(tasks_of(plan, "evaluate", "dense")[0], store)
    expected = load_extractor("tiny-features")(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    found = arrays(store, record, "features.safetensors")["features"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert dense.outputs["metrics"]["fid"]["value"] > 1
    with pytest.raises(DipgoError, match="no reference images"):
        run_task(task, copied(finished, tmp_path / "other", ("reference",)))


def test_few_steps_is_charged_against_the_dense_run(finished: Any) -> None:
    _, plan, records = finished
    point = next(point for point in plan.points if point.method == "few_steps")
    outputs = records[str(point.evaluate_key)].outputs
    assert outputs["pruned_ratio"] == pytest.approx(0.5)
    assert len(outputs["subnet"]["keep"]) == 2


def test_latency_has_both_sides(finished: Any) -> None:
    _, plan, records = finished
    point = next(point for point in plan.points if point.method == "uniform")
    outputs = records[str(point.latency_key)].outputs
    assert {"latency_ms", "dense_latency_ms", "speedup"} <= set(outputs)
    assert outputs["latency_ms"]["low"] <= outputs["latency_ms"]["value"]


def test_a_worker_loads_a_pipeline_once(finished: Any) -> None:
    assert loaded.cache_info().misses == 1
    assert loaded.cache_info().hits > 5


def test_record_says_where_and_with_what(finished: Any) -> None:
    _, plan, records = finished
    record = records[plan.tasks[0].key]
    assert record.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert {"hostname", "cpu", "device"} <= set(record.host)
    assert record.timings["seconds"] > 0


def test_run_task_repeats_nothing_that_is_done(finished: Any) -> None:
    store, plan, records = finished
    task = tasks_of(plan, "search", "dipgo")[0]
    assert run_task(task, store) == records[task.key]


class Stop(Exception):
    """Raised out of a progress report, as a killed worker would stop."""


def copied(finished: Any, tmp_path: Path, kinds: tuple[str, ...]) -> Store:
    """A new store that has the finished records of some kinds."""
    store, _, records = finished
    copy = open_store(tmp_path / "copy")
    for digest in (store.folder / "blobs").iterdir():
        copy.put_blob(digest.read_bytes())
    for record in records.values():
        if record.kind in kinds:
            for name in record.artifacts:
                copy.put_artifact(record.key, name, store.get_artifact(record, name))
            copy.put_record(record)
    return copy


def test_interrupted_search_ends_as_the_uninterrupted_one(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan, records = finished
    store = copied(finished, tmp_path, ("reference",))
    task = tasks_of(plan, "search", "dipgo")[0]
    monkeypatch.setattr(search_task, "CHECKPOINT_EVERY_S", -1.0)

    def stop(report: Mapping[str, Any]) -> None:
        if report["search_step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        run_task(task, store, on_progress=stop)
    assert store.get_progress(task.key, search_task.CHECKPOINT) is not None
    reports: list[Mapping[str, Any]] = []
    record = run_task(task, store, on_progress=reports.append)
    assert [report["search_step"] for report in reports] == [3]
    assert record.outputs["outcome"] == records[task.key].outputs["outcome"]
    assert record.outputs["curve"]["search_step"] == [1, 2, 3]
    assert store.get_progress(task.key, search_task.CHECKPOINT) is None


def test_damaged_checkpoint_starts_the_search_anew(finished: Any, tmp_path: Path) -> None:
    _, plan, records = finished
    store = copied(finished, tmp_path, ("reference",))
    task = tasks_of(plan, "search", "dipgo")[0]
    store.put_progress(task.key, search_task.CHECKPOINT, b"torn")
    store.put_progress(task.key, search_task.CURVE, b"[]")
    record = run_task(task, store)
    assert record.outputs["outcome"] == records[task.key].outputs["outcome"]


def test_interrupted_evaluation_goes_on_after_its_finished_shards(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan, records = finished
    store = copied(finished, tmp_path, ("reference", "statistics"))
    task = next(t for t in tasks_of(plan, "evaluate", "uniform") if "calibration" not in t.label)
    with pytest.raises(Stop):
        run_task(task, store, on_progress=raise_stop)
    made: list[range] = []
    shards = evaluate_task.evaluate_shards

    def spied(*args: Any, **kwargs: Any) -> Any:
        made.extend(kwargs["shards"])
        return shards(*args, **kwargs)

    monkeypatch.setattr(evaluate_task, "evaluate_shards", spied)
    assert run_task(task, store).outputs == records[task.key].outputs
    assert made == [range(3, 5)]


def test_evaluation_that_goes_on_from_fewer_images_equals_a_direct_one(
    finished: Any, tmp_path: Path
) -> None:
    made, plan, records = finished
    store = copied(finished, tmp_path, ("reference", "statistics"))
    direct = next(t for t in tasks_of(plan, "evaluate", "uniform") if "calibration" not in t.label)
    fewer = {**direct.inputs["protocol"], "images": 4}
    lower = replace(direct, inputs={**direct.inputs, "protocol": fewer})
    run_task(lower, store)
    options = {**direct.options, "continues": lower.key}
    record, whole = run_task(replace(direct, options=options), store), records[direct.key]
    assert (record.outputs["n_continued"], whole.outputs["n_continued"]) == (4, 0)
    for name in ("per_image.safetensors", "features.safetensors", "samples.safetensors"):
        expected = arrays(made, whole, name)
        for key, rows in arrays(store, record, name).items():
            assert rows == pytest.approx(expected[key], rel=1e-3, abs=1.0), key
    for metric, figure in whole.outputs["metrics"].items():
        found = record.outputs["metrics"][metric]
        assert found["value"] == pytest.approx(figure["value"], rel=1e-3, abs=1e-3), metric


def raise_stop(report: Mapping[str, Any]) -> None:
    raise Stop


def test_run_task_refuses_weights_that_were_not_planned_with(finished: Any, tmp_path: Path) -> None:
    _, plan, _ = finished
    task = tasks_of(plan, "reference", "test")[0]
    other = {**task.inputs["model"], "weights_sha256": "0" * 64}
    with pytest.raises(ModelFilesError, match="they changed"):
        run_task(replace(task, inputs={**task.inputs, "model": other}), open_store(tmp_path))


def test_latency_refuses_another_device(finished: Any, tmp_path: Path) -> None:
    _, plan, _ = finished
    store = copied(finished, tmp_path, ("reference",))
    task = tasks_of(plan, "latency")[0]
    with pytest.raises(TaskError, match="planned for 'abacus'"):
        run_task(replace(task, inputs={**task.inputs, "device": "abacus"}), store)


def test_task_without_its_reference_says_so(finished: Any, tmp_path: Path) -> None:
    store, plan, _ = finished
    task = tasks_of(plan, "search")[0]
    empty = copied(finished, tmp_path, ())
    with pytest.raises(DipgoError, match="needs the record"):
        run_task(task, empty)


def test_plan_of_real_records_has_nothing_to_do(finished: Any, folder: Path) -> None:
    sweep = sweep_of(folder)
    _, plan, records = finished
    again = build_plan(
        sweep,
        records,
        facts=gather_facts(sweep),
        device=tasks_of(plan, "latency")[0].inputs["device"],
    )
    assert again.complete


def test_a_copy_of_the_model_in_another_folder_has_the_same_tasks(
    finished: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, plan, _ = finished
    shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)

    moved = sweep_of(Path("elsewhere"))
    tasks = build_plan(moved, {}, facts=gather_facts(moved), device=device_name("cpu")).ready

    assert {task.key for task in tasks} <= {task.key for task in plan.tasks}
    assert {t.options["model_folder"] for t in tasks} == {str(tmp_path / "elsewhere" / "model")}


def test_packed_keeps_the_values_of_a_transposed_array() -> None:
    transposed = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1)  # DiT's images
    found = safetensors.numpy.load(packed({"images": transposed}))["images"]
    np.testing.assert_array_equal(found, transposed)
