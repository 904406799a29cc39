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
from orchestrator.task import images as images_task
from orchestrator.task import run_task, steps
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


def dense_images(store: Store, records: Mapping[str, Record], plan: Plan, split: str) -> Any:
    """The images of the dense run, by file, from the shards that have them."""
    record = records[tasks_of(plan, "reference", split)[0].key]
    shards = [records[key] for key in record.outputs["shards"]]
    return {
        name: arrays(store, shard, name)["images"]
        for shard in shards
        for name in sorted(shard.artifacts)
        if name.startswith("images-")
    }


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
    files = dense_images(store, records, plan, "test")
    images = np.concatenate(list(files.values()))
    assert list(files) == ["images-000000.safetensors", "images-000003.safetensors"]
    difference = np.abs(images.astype(int) - stock_images(model, range(5)).astype(int))
    assert difference.max() <= 1  # batches of two against one: rounding


def test_reference_latents_decode_to_its_images(finished: Any, model: Any) -> None:
    store, plan, records = finished
    record = records[tasks_of(plan, "reference", "calibration")[0].key]
    latents = safetensors.torch.load(store.get_artifact(record, "latents.safetensors"))["latents"]
    (images,) = dense_images(store, records, plan, "calibration").values()
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
    images = np.concatenate(list(dense_images(store, records, plan, "test").values()))
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
    store = copied(finished, tmp_path, DENSE_RUN)
    plan = build_plan(sweep, store.records(), facts=gather_facts(sweep), device="none")
    (task,) = tasks_of(plan, "statistics")
    record = run_task(task, store)
    shutil.rmtree(real)
    evaluate = tasks_of(plan, "evaluate", "dense")[0]
    for shard in (t for t in tasks_of(plan, "images") if t.key in evaluate.needs):
        run_task(shard, store)
    dense = run_task(evaluate, store)
    expected = load_extractor("tiny-features")(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    found = arrays(store, record, "features.safetensors")["features"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert dense.outputs["metrics"]["fid"]["value"] > 1
    with pytest.raises(DipgoError, match="no reference images"):
        run_task(task, copied(finished, tmp_path / "other", DENSE_RUN))


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
    assert {"hostname", "cpu", "device", "gpus"} <= set(record.host)
    assert record.timings["seconds"] > 0


def test_run_task_repeats_nothing_that_is_done(finished: Any) -> None:
    store, plan, records = finished
    task = tasks_of(plan, "search", "dipgo")[0]
    assert run_task(task, store) == records[task.key]


#: What the dense run has left, and all other shards.
DENSE_RUN = ("reference", "images")


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
    monkeypatch.setattr(steps, "CHECKPOINT_EVERY_S", -1.0)

    def stop(report: Mapping[str, Any]) -> None:
        if report["search_step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        run_task(task, store, on_progress=stop)
    assert store.get_progress(task.key, steps.CHECKPOINT) is not None
    assert len(list(store.backend.list(f"progress/{task.key}"))) == 1  # state and curve of one step
    reports: list[Mapping[str, Any]] = []
    record = run_task(task, store, on_progress=reports.append)
    assert [report["search_step"] for report in reports] == [3]
    assert record.outputs["outcome"] == records[task.key].outputs["outcome"]
    assert record.outputs["curve"]["search_step"] == [1, 2, 3]
    assert store.get_progress(task.key, steps.CHECKPOINT) is None


def test_damaged_checkpoint_starts_the_search_anew(finished: Any, tmp_path: Path) -> None:
    _, plan, records = finished
    store = copied(finished, tmp_path, ("reference",))
    task = tasks_of(plan, "search", "dipgo")[0]
    store.put_progress(task.key, steps.CHECKPOINT, b"torn")
    record = run_task(task, store)
    assert record.outputs["outcome"] == records[task.key].outputs["outcome"]


def uniform_shards(folder: Path, store: Store, *, size: int = 3) -> tuple[Task, list[Task]]:
    """The evaluation of the uniform baseline on test images, and the shards it needs."""
    sweep = sweep_of(folder)
    sweep = replace(sweep, resources=replace(sweep.resources, images_per_shard=size))
    plan = build_plan(sweep, store.records(), facts=gather_facts(sweep), device="none")
    merge = next(t for t in tasks_of(plan, "evaluate", "uniform") if "calibration" not in t.label)
    return merge, [t for t in tasks_of(plan, "images") if t.key in merge.needs]


def without_shards(finished: Any, tmp_path: Path) -> Store:
    """A copy of the store that has the dense run, and no image of any gate table."""
    store = copied(finished, tmp_path, ("reference", "statistics"))
    made, _, records = finished
    for record in (r for r in records.values() if r.kind == "images" and "keep" not in r.inputs):
        for name in record.artifacts:
            store.put_artifact(record.key, name, made.get_artifact(record, name))
        store.put_record(record)
    return store


def test_interrupted_shard_goes_on_after_its_finished_pieces(
    finished: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, records = finished
    monkeypatch.setattr(images_task, "CHUNK_BYTES", 1)  # a batch is a piece
    store = without_shards(finished, tmp_path)
    _, (first, _) = uniform_shards(folder, store)
    with pytest.raises(Stop):
        run_task(first, store, on_progress=raise_stop)
    made: list[range] = []
    shards = images_task.evaluate_shards

    def spied(*args: Any, **kwargs: Any) -> Any:
        made.extend(kwargs["shards"])
        return shards(*args, **kwargs)

    monkeypatch.setattr(images_task, "evaluate_shards", spied)
    record = run_task(first, store)
    assert made == [range(2, 3)]
    assert (record.outputs, record.artifacts) == (
        records[first.key].outputs,
        records[first.key].artifacts,
    )


def test_interrupted_dense_shard_goes_on_after_its_finished_pieces(
    folder: Path, finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, records = finished
    monkeypatch.setattr(images_task, "CHUNK_BYTES", 1)
    sweep, store = sweep_of(folder), copied(finished, tmp_path, ())
    plan = build_plan(sweep, {}, facts=gather_facts(sweep), device="none")
    first = next(task for task in plan.ready if "test" in task.label)
    with pytest.raises(Stop):
        run_task(first, store, on_progress=raise_stop)
    reports: list[Mapping[str, Any]] = []
    record = run_task(first, store, on_progress=reports.append)
    assert [report["images"] for report in reports] == [2, 3]
    # calls of the denoiser: 2 batches of 4; the first one was made before the interruption
    assert record.outputs["forwards"] == records[first.key].outputs["forwards"] == 8
    pixels = [arrays(store, record, name)["images"] for name in sorted(record.artifacts)]
    whole = dense_images(finished[0], records, finished[1], "test")["images-000000.safetensors"]
    assert np.array_equal(np.concatenate(pixels), whole)


@pytest.mark.parametrize("size", [2, 4])
def test_one_shard_and_several_give_the_same_bits(
    folder: Path, finished: Any, tmp_path: Path, size: int
) -> None:
    """Batches of two: cuts at even images leave every batch as it is in one run."""
    found = []
    for each in (size, 100):
        store = without_shards(finished, tmp_path / str(each))
        merge, shards = uniform_shards(folder, store, size=each)
        assert len(shards) == -(-5 // each)
        for shard in reversed(shards):
            run_task(shard, store)
        found.append(run_task(merge, store))
    assert found[0].outputs == found[1].outputs
    assert found[0].artifacts == found[1].artifacts


def test_fewer_images_are_taken_from_a_longer_shard(
    folder: Path, finished: Any, tmp_path: Path
) -> None:
    made, _, records = finished
    store = copied(finished, tmp_path, (*DENSE_RUN, "statistics"))
    merge, shards = uniform_shards(folder, store)
    fewer = {**merge.inputs["protocol"], "images": 4}
    options = {**merge.options, "shards": [shard.key for shard in shards]}
    task = replace(merge, inputs={**merge.inputs, "protocol": fewer}, options=options)
    record, whole = run_task(task, store), records[merge.key]
    assert record.outputs["n_images"] == 4 and record.outputs["forwards"] == 4 + 2 // 2
    for name in ("per_image.safetensors", "features.safetensors", "samples.safetensors"):
        expected = arrays(made, whole, name)
        for key, rows in arrays(store, record, name).items():
            assert np.array_equal(rows, expected[key][:4]), key


def raise_stop(report: Mapping[str, Any]) -> None:
    raise Stop


def test_run_task_refuses_weights_that_were_not_planned_with(
    finished: Any, folder: Path, tmp_path: Path
) -> None:
    task = uniform_shards(folder, copied(finished, tmp_path / "copy", DENSE_RUN))[1][0]
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
    _, _, records = finished
    shutil.copytree(folder, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)

    moved = sweep_of(Path("elsewhere"))
    tasks = build_plan(moved, {}, facts=gather_facts(moved), device=device_name("cpu")).ready

    assert tasks and {task.key for task in tasks} <= records.keys()
    assert {t.options["model_folder"] for t in tasks} == {str(tmp_path / "elsewhere" / "model")}


def test_packed_keeps_the_values_of_a_transposed_array() -> None:
    transposed = np.arange(24, dtype=np.uint8).reshape(2, 3, 4).transpose(2, 0, 1)  # DiT's images
    found = safetensors.numpy.load(packed({"images": transposed}))["images"]
    np.testing.assert_array_equal(found, transposed)
