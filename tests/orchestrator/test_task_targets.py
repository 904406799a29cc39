"""Searches at a target and errors of reuses on a tiny pipeline, with a strategy of the test's own.

Oracles: what the strategy was given and gave, an uninterrupted measurement.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import SearchDivergedError
from dipgo_core.families import Scorers
from dipgo_core.gates import GateTable
from dipgo_core.outcome import SearchOutcome
from dipgo_core.search import STRATEGIES, SearchProblem, SearchProgress
from dipgo_core.search.progress import NOTHING_YET
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.planned import Plan
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.sweep_settings import (
    Calibration,
    EvaluateSettings,
    PromptSource,
    SearchGrid,
    SweepFile,
    SweepModel,
    Tracking,
)
from orchestrator.task import run_task, steps
from orchestrator.task.work import loaded
from tests.orchestrator.tiny_sweep import Listener
from tests.support.tiny import tiny_sd

CALLS = 4
STEPS = 3


class Stop(Exception):
    """The task is interrupted."""


class FakeStrategy:
    """Takes three steps, and finds the first calls, as many as the budget holds."""

    def __init__(self) -> None:
        self.problems: list[SearchProblem] = []

    def __call__(self, problem: SearchProblem) -> Iterator[SearchProgress]:
        self.problems.append(problem)
        first = 1 if problem.resume is None else int(problem.resume["search_step"]) + 1
        for step in range(first, STEPS + 1):
            yield self.progress(problem, step)

    def progress(self, problem: SearchProblem, step: int) -> SearchProgress:
        return SearchProgress(
            search_step=step,
            num_steps=STEPS,
            **NOTHING_YET._asdict(),
            forwards=10 * step,
            sample_forwards=2.5 * step,
            seconds=0.0,
            outcome=outcome_of(problem) if step == STEPS else None,
            snapshot=lambda: {"search_step": torch.tensor(step)},
        )


def outcome_of(problem: SearchProblem) -> SearchOutcome:
    (target,) = problem.targets
    kept = tuple(range(round(CALLS * (1 - target))))
    rows = GateTable.from_calls(kept, CALLS, problem.graph.num_blocks).to_strings()
    return SearchOutcome(tables={target: tuple(rows)}, forwards=30, sample_forwards=7.5)


def sweep_of(folder: Path) -> SweepFile:
    def prompts(name: str) -> PromptSource:
        return PromptSource(kind="file", value=str(folder / f"{name}.txt"))

    axes: dict[str, tuple[Any, ...]] = {"strategy": ("auto",), "staleness": (2,)}
    model = SweepModel(
        name="tiny",
        family="sd",
        settings=ModelSettings(id=str(folder / "model")),
        sampler=SamplerSettings(scheduler="ddim", steps=CALLS, guidance_scale=3.0),
        targets=(0.25, 0.5),
        baselines=(),
        grid=SearchGrid(axes=axes),
        calibration=Calibration(prompts=prompts("calibration"), images=2, batch_size=2),
        evaluate=EvaluateSettings(
            prompts=prompts("test"),
            images=2,
            scorers=Scorers(features="tiny-features", clip=None),
            metrics=("psnr",),
            batch_size=2,
        ),
    )
    return SweepFile(name="real", models=(model,), tracking=Tracking(experiment="real"))


@pytest.fixture(scope="module")
def strategy() -> Iterator[FakeStrategy]:
    with pytest.MonkeyPatch.context() as patch:
        fake = FakeStrategy()
        patch.setitem(STRATEGIES, "auto", fake)
        yield fake


@pytest.fixture(scope="module")
def finished(
    strategy: FakeStrategy, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Plan, Mapping[str, Record]]:
    """The whole sweep, run once."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny_sd().save_pretrained(folder / "model")
    (folder / "test.txt").write_text("a red cat\na blue dog\n")
    (folder / "calibration.txt").write_text("the moon\na red moon\n")
    store = open_store(folder / "store")
    loaded.cache_clear()
    result = run_sweep(sweep_of(folder), store, InProcessExecutor(), Listener())
    assert result.plan.complete, result.failed
    return store, result.plan, store.records()


def tasks_of(plan: Plan, kind: str, label: str = "") -> list[Task]:
    return [t.task for t in plan.tasks if t.kind == kind and label in t.label and t.task]


def copied(store: Store, folder: Path, but: str) -> Store:
    """Return a copy of a store in which a task is still to do."""
    copy = open_store(folder)
    for room in ("records", "artifacts", "blobs"):
        source = Path(store.backend.folder or "") / room
        if source.is_dir():
            shutil.copytree(source, folder / room)
    (folder / "records" / f"{but}.json").unlink()
    return copy


def test_search_is_given_its_target_and_what_was_found_before(
    finished: Any, strategy: FakeStrategy
) -> None:
    store, plan, records = finished
    (errors,) = (
        store.get_artifact(records[t.key], "errors.safetensors") for t in tasks_of(plan, "errors")
    )
    masks = next(
        task
        for task in tasks_of(plan, "search", "best_step_mask")
        if records[task.key].inputs["target"] == 0.25
    )
    found = SearchOutcome.from_json(records[masks.key].outputs["outcome"]).step_masks
    first, second, *_ = strategy.problems
    assert (first.targets, second.targets) == ((0.25,), (0.5,))
    assert first.convention == "all" and first.step_masks == found
    assert first.errors is not None
    assert torch.equal(first.errors["covariances"], safetensors.torch.load(errors)["covariances"])


def test_search_record_tells_its_cost_and_its_share(finished: Any) -> None:
    _, plan, records = finished
    for task in tasks_of(plan, "search", "auto"):
        outputs = records[task.key].outputs
        assert outputs["forwards"] == 30 and outputs["sample_forwards"] == 7.5
        assert outputs["all_or_nothing_share"] == 1.0
        assert outputs["peak_memory_bytes"] is None or outputs["peak_memory_bytes"] > 10**6
        assert outputs["curve"]["search_step"] == [1, 2, 3]


def test_points_have_the_gates_that_were_found_at_their_target(finished: Any) -> None:
    _, plan, _ = finished
    points = [point for point in plan.points if point.method == "search"]
    assert [sum("1" in row for row in point.keep) for point in points] == [3, 2]


def test_errors_record_tells_its_cost_and_has_every_reuse(finished: Any) -> None:
    store, plan, records = finished
    (task,) = tasks_of(plan, "errors")
    record = records[task.key]
    found = safetensors.torch.load(store.get_artifact(record, "errors.safetensors"))
    reuses = 10 * 2  # blocks, ages
    assert found["covariances"].shape == (CALLS, reuses, reuses)
    assert record.outputs["forwards"] == int(found["forwards"]) > CALLS
    assert record.outputs["sample_forwards"] > 0


def stopped_at(step: int) -> Any:
    def report(figures: Mapping[str, Any]) -> None:
        if figures.get("search_step") == step:
            raise Stop

    return report


def test_interrupted_measurement_ends_as_the_uninterrupted_one(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan, records = finished
    (task,) = tasks_of(plan, "errors")
    copy = copied(store, tmp_path / "copy", task.key)
    monkeypatch.setattr(steps, "CHECKPOINT_EVERY_S", -1.0)
    with pytest.raises(Stop):
        run_task(task, copy, on_progress=stopped_at(3))
    assert copy.get_progress(task.key, steps.CHECKPOINT) is not None
    again = run_task(task, copy)
    both = [
        safetensors.torch.load(s.get_artifact(r, "errors.safetensors"))["covariances"].numpy()
        for s, r in ((copy, again), (store, records[task.key]))
    ]
    np.testing.assert_array_equal(*both)
    assert copy.get_progress(task.key, steps.CHECKPOINT) is None


def test_interrupted_search_at_a_target_goes_on_from_its_state(
    finished: Any, strategy: FakeStrategy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan, records = finished
    task = tasks_of(plan, "search", "auto")[0]
    copy = copied(store, tmp_path / "copy", task.key)
    monkeypatch.setattr(steps, "CHECKPOINT_EVERY_S", -1.0)
    with pytest.raises(Stop):
        run_task(task, copy, on_progress=stopped_at(3))
    record = run_task(task, copy)
    resumed = strategy.problems[-1].resume
    assert resumed is not None and int(resumed["search_step"]) == 2
    assert record.outputs["outcome"] == records[task.key].outputs["outcome"]
    assert record.outputs["curve"]["search_step"] == [1, 2, 3]


def test_search_that_leads_nowhere_keeps_what_was_good(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, plan, _ = finished
    task = tasks_of(plan, "search", "auto")[0]
    copy = copied(store, tmp_path / "copy", task.key)

    def diverging(problem: SearchProblem) -> Iterator[SearchProgress]:
        yield FakeStrategy().progress(problem, 1)
        raise SearchDivergedError("the loss is not finite", outcome_of(problem))

    monkeypatch.setitem(STRATEGIES, "auto", diverging)
    with pytest.raises(SearchDivergedError, match=f"not finite, kept as progress/{task.key}"):
        run_task(task, copy)
    kept = copy.get_progress(task.key, "last_good.json")
    assert kept is not None
    assert SearchOutcome.from_json(json.loads(kept)).tables is not None


def test_search_whose_errors_are_gone_says_so(finished: Any, tmp_path: Path) -> None:
    store, plan, _ = finished
    (errors,), search = tasks_of(plan, "errors"), tasks_of(plan, "search", "auto")[0]
    copy = copied(store, tmp_path / "copy", errors.key)
    (tmp_path / "copy" / "records" / f"{search.key}.json").unlink()
    with pytest.raises(Exception, match=f"needs the record {errors.key[:12]}, which is gone"):
        run_task(search, copy)
