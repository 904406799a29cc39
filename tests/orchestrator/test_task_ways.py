"""How a worker runs a task in less memory: what its options say reaches model and search."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dipgo_core.search import STRATEGIES
from orchestrator.facts import gather_facts
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.records import Task
from orchestrator.store import Store, open_store
from orchestrator.sweep_file import load_sweep
from orchestrator.task import run_task
from orchestrator.task.run import gpu_memory
from orchestrator.task.work import Work


@pytest.fixture(scope="module")
def plan(repository: Path) -> Plan:
    sweep = load_sweep(repository / "sweeps" / "quickstart.yaml")
    return build_plan(sweep, {}, facts=gather_facts(sweep), device="a cpu")


def first(plan: Plan, kind: str) -> Task:
    return next(known.task for known in plan.tasks if known.kind == kind and known.task)


def work_of(task: Task, folder: Path) -> Work:
    return Work(task, open_store(folder), lambda report: None)


def test_options_set_how_the_model_decodes_and_the_next_task_undoes_it(
    plan: Plan, tmp_path: Path
) -> None:
    task = first(plan, "reference")
    sliced = replace(task, options={**task.options, "decoding": {"slicing": True}})
    assert work_of(sliced, tmp_path).model.pipe.vae.use_slicing
    assert not work_of(task, tmp_path).model.pipe.vae.use_slicing


def test_tiles_come_from_the_inputs(plan: Plan, tmp_path: Path) -> None:
    task = first(plan, "images")
    tiled = replace(
        task, inputs={**task.inputs, "protocol": {**task.inputs["protocol"], "tile": 16}}
    )
    assert work_of(tiled, tmp_path).model.pipe.vae.tile_sample_min_size == 16
    assert tiled.key != task.key
    work_of(task, tmp_path).model  # noqa: B018  (whole again, for other tests)


def test_a_search_gets_the_ways_that_were_chosen(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def strategy(problem: Any) -> Any:
        raise Seen(problem.images_at_once, problem.checkpoint_calls)

    store, search = open_store(tmp_path), first(plan, "search")
    monkeypatch.setitem(STRATEGIES, "dipgo", strategy)
    for name in ("model", "graph", "reference"):
        monkeypatch.setattr(Work, name, None)
    monkeypatch.setattr("orchestrator.task.search.items_and_seeds", lambda work: ((), ()))
    latents = torch.zeros(1, 4, 4, 4)
    monkeypatch.setattr("safetensors.torch.load", lambda data: {"latents": latents})
    monkeypatch.setattr(Store, "get_artifact", lambda *args: b"")
    chosen = {"images_at_once": 2, "checkpoint_calls": True}
    with pytest.raises(Seen) as seen:
        run_task(replace(search, options={"memory": chosen}), store)
    assert seen.value.args == (2, True)


def test_records_of_a_gpu_say_what_was_held_beside_the_estimate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9)
    task = Task(kind="search", inputs={}, options={"estimated_bytes": 8})
    held = {"estimated_bytes": 8, "allocated_bytes": 7, "reserved_bytes": 9}
    assert gpu_memory(task, "cuda") == {"gpu_memory": held}
    assert gpu_memory(task, "cpu") == {}
