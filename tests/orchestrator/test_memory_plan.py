"""Memory in the plan: what is chosen goes into options, tiles into keys, and what cannot fit stops.

Models are known ones whose weights nobody needs: sizes come from their facts.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import PreflightError
from dipgo_core.families.sizes import known_sizes
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.memory import GB, with_gpu_memory
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.records import Task
from orchestrator.store import open_store
from orchestrator.sweep_settings import AskedResources, Baseline, Resources, SearchGrid, SweepFile
from tests.orchestrator.tiny_sweep import Listener, tiny_facts, tiny_sweep

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"


def sdxl_sweep(
    gpu_memory_gb: float | None, *, images: int = 1, dtype: Any = "float16"
) -> SweepFile:
    """The tiny sweep, of SDXL at 1024 pixels, 50 calls, on GPUs of this size."""
    gpu = AskedResources(gpus=1, gpu_memory_gb=gpu_memory_gb)
    sweep = tiny_sweep()
    (model,) = sweep.models
    model = replace(
        model,
        family="sdxl",
        settings=ModelSettings(id=SDXL, dtype=dtype),
        sampler=SamplerSettings(scheduler="ddim", steps=50, guidance_scale=5.0),
        grid=SearchGrid(axes={**model.grid.axes, "batch_size": (images,)}),
    )
    return replace(
        sweep,
        models=(model,),
        resources=Resources(reference=gpu, search=gpu, evaluate=gpu, latency=gpu),
    )


def facts_of(sweep: SweepFile) -> dict[str, Any]:
    sized = {"height": 1024, "width": 1024, "sizes": known_sizes()[SDXL]}
    return {name: replace(facts, **sized) for name, facts in tiny_facts(sweep).items()}


def plan_of(sweep: SweepFile) -> Plan:
    return build_plan(sweep, {}, facts=facts_of(sweep), device="a gpu")


def tasks_of(plan: Plan, kind: str) -> list[Task]:
    return [known.task for known in plan.tasks if known.kind == kind and known.task is not None]


def searched(plan: Plan) -> Task:
    return next(t for t in tasks_of(plan, "search") if t.inputs["search"]["strategy"] == "dipgo")


def test_nothing_is_chosen_where_nobody_says_how_much_there_is() -> None:
    plan = plan_of(sdxl_sweep(None))
    assert plan.too_large == () and all(row.choices == () for row in plan.memory)
    assert "memory" not in searched(plan).options
    assert all("decoding" not in task.options for task in tasks_of(plan, "images"))


def test_a_search_that_fits_as_it_is_may_keep_nothing_or_all() -> None:
    options = searched(plan_of(sdxl_sweep(80))).options
    assert options["memory"] == {"images_at_once": None, "checkpoint_calls": True}
    assert options["estimated_bytes"] < 80 * GB
    assert searched(plan_of(sdxl_sweep(2000))).options["memory"]["checkpoint_calls"] is False


def test_batches_of_a_search_are_split_and_its_key_stays() -> None:
    whole, split = (searched(plan_of(sdxl_sweep(gb, images=4))) for gb in (None, 40))
    assert split.options["memory"]["images_at_once"] in (1, 2)
    assert split.options["decoding"] == {"checkpointing": True}
    assert split.key == whole.key and split.inputs["search"]["batch_size"] == 4


def test_images_at_a_time_are_no_part_of_a_key() -> None:
    many, few = (tasks_of(plan_of(sdxl_sweep(gb)), "images")[0] for gb in (None, 14))
    assert few.options["batch_size"] < many.options["batch_size"]
    assert few.options["decoding"] == {"slicing": True} and few.key == many.key


def small(gb: float) -> SweepFile:
    """Only searches have a small GPU."""
    sweep = sdxl_sweep(None)
    search = AskedResources(gpus=1, gpu_memory_gb=gb)
    return replace(sweep, resources=replace(sweep.resources, search=search))


def test_tiles_are_for_all_tasks_of_a_model_and_in_their_keys() -> None:
    """A search in 28 GB fits only in tiles: then every image of the model is decoded in tiles."""
    whole = plan_of(small(80))
    fits = (plan_of(small(gb)) for gb in range(40, 10, -1))
    tiled = next(plan for plan in fits if plan.memory[0].fit.run.decoding.tile)
    assert tiled.too_large == ()
    reference = tasks_of(tiled, "reference")[0]
    assert reference.inputs["protocol"]["tile"] == 512
    assert reference.key != tasks_of(whole, "reference")[0].key
    assert any("changes images" in choice for choice in tiled.memory[0].choices)


def test_what_cannot_fit_is_named_with_a_next_move() -> None:
    (line, *_) = [line for line in plan_of(small(6)).too_large if "dipgo" in line]
    assert "tiny" in line and "search" in line and "there are 6.0" in line
    assert "denoiser 5.1" in line and "larger GPU" in line


def test_a_run_that_cannot_fit_computes_nothing(tmp_path: Any) -> None:
    def never(*args: object, **kwargs: object) -> Any:
        raise AssertionError("a task was run")

    sweep, store = small(6), open_store(tmp_path)
    with pytest.raises(PreflightError, match="needs about"):
        run_sweep(
            sweep, store, InProcessExecutor(), Listener(), run_task=never, facts=facts_of(sweep)
        )
    assert not store.records()


def test_the_memory_of_the_gpu_that_is_there_is_filled_in() -> None:
    parts = Resources(
        search=AskedResources(gpus=0.5),
        reference=AskedResources(gpus=0),
        evaluate=AskedResources(gpus=1, gpu_memory_gb=20),
    )
    found = with_gpu_memory(replace(tiny_sweep(), resources=parts), 80).resources
    assert (found.search.gpu_memory_gb, found.evaluate.gpu_memory_gb) == (40, 20)
    assert found.reference.gpu_memory_gb is None  # takes no GPU


def test_rows_are_json() -> None:
    row = json.loads(json.dumps(plan_of(sdxl_sweep(80)).to_json()))["memory"][0]
    assert row["kind"] == "reference" and row["fits"] is True and row["gpu_bytes"] == 80 * GB
    assert sum(row["parts"].values()) < row["estimated_bytes"]


def test_searches_that_need_the_same_are_told_once() -> None:
    sweep = small(6)
    (model,) = sweep.models
    grid = SearchGrid(axes={**model.grid.axes, "seed": (0, 1, 2)})
    lines = plan_of(replace(sweep, models=(replace(model, grid=grid),))).too_large
    (line,) = [line for line in lines if "dipgo" in line]
    assert "like it" in line


def test_a_search_for_step_masks_decodes_nothing() -> None:
    sweep = sdxl_sweep(80)
    (model,) = sweep.models
    masks = replace(model, baselines=(Baseline(name="best_step_mask"),))
    rows = {row.label: row for row in plan_of(replace(sweep, models=(masks,))).memory}
    assert "images" not in rows["best_step_mask"].fit.need.parts
