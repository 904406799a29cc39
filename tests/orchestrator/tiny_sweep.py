"""A sweep of a made-up model with three blocks, and a task function that needs no torch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.evaluation.prompts import items_sha256
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.families import Scorers
from dipgo_core.gates import GateTable
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse
from dipgo_core.items import Item
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.facts import ItemSet, ModelFacts
from orchestrator.planned import Plan
from orchestrator.records import Record, Task
from orchestrator.store import Store
from orchestrator.sweep_settings import (
    Baseline,
    Calibration,
    EvaluateSettings,
    PromptSource,
    SearchGrid,
    SweepFile,
    SweepModel,
    Tracking,
)
from orchestrator.sweep_tasks import Event, RunResult

GRAPH = BlockGraph(
    denoiser="UNet2DConditionModel",
    granularity="block",
    blocks=(
        Block("", Reuse.SKIP, 10, 10),
        Block("down", Reuse.OUTPUT, 20, 18),
        Block("mid", Reuse.OUTPUT, 30, 30),
        Block("up", Reuse.OUTPUT, 40, 36),
    ),
    producers=((3,), (INPUT,), (1,), (1, 2)),
)

#: As a reference records it: this model is gated alike at either granularity.
GRAPHS = {name: replace(GRAPH, granularity=name).to_json() for name in ("block", "layer")}

ALL_BASELINES = (
    Baseline(name="few_steps", spacing=("leading", "trailing")),
    Baseline(name="uniform"),
    Baseline(name="best_step_mask"),
    Baseline(name="random", draws=2),
)


def tiny_sweep(
    *,
    targets: Sequence[float] = (0.5, 0.7),
    alphas: Sequence[float] = (1.0,),
    baselines: Sequence[Baseline] = (),
    models: Sequence[str] = ("tiny",),
    metrics: Sequence[Any] = ("clip", "psnr", "latency"),
    storage: str = "./.dipgo",
    rungs: Sequence[int] = (),
    strategies: Sequence[str] = ("dipgo",),
) -> SweepFile:
    """Return a sweep at 10 calls; every argument is an axis of it."""
    return SweepFile(
        name="tiny",
        models=tuple(
            SweepModel(
                name=name,
                family="sd",
                settings=ModelSettings(id=name),
                sampler=SamplerSettings(scheduler="ddim", steps=10, guidance_scale=3.0),
                targets=tuple(targets),
                baselines=tuple(baselines),
                grid=SearchGrid(
                    axes={"steps": (8,), "strategy": tuple(strategies)},
                    losses=({"alpha": tuple(alphas)},),
                ),
                calibration=Calibration(prompts=PromptSource(kind="bundled", value="calibration")),
                evaluate=EvaluateSettings(
                    prompts=PromptSource(kind="bundled", value="test"),
                    images=rungs[-1] if rungs else 16,
                    rungs=tuple(rungs),
                    scorers=Scorers(features="tiny-features", clip="tiny-clip"),
                    metrics=tuple(metrics),
                    race=tuple(m for m in metrics if m not in ("fid", "latency")) if rungs else (),
                ),
            )
            for name in models
        ),
        tracking=Tracking(experiment="tiny"),
        storage=storage,
    )


def item_set(*prompts: str) -> ItemSet:
    items = tuple(Item(prompt) for prompt in prompts)
    return ItemSet(sha256=items_sha256(items), count=len(items), items=items)


def tiny_facts(sweep: SweepFile) -> dict[str, ModelFacts]:
    """Return facts of models that do not exist."""
    scorer = Scorer("tiny", "0" * 64, "none")
    return {
        model.name: ModelFacts(
            weights_sha256=hashlib.sha256(model.name.encode()).hexdigest(),
            height=32,
            width=32,
            test=item_set("a red boot", "a blue shirt"),
            calibration=item_set("a green coat"),
            scorers={"features": scorer, "clip": scorer},
        )
        for model in sweep.models
    }


def run_tiny_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
    """Make up a plausible record; the figures follow from the inputs alone."""
    time.sleep(task.options.get("sleep", 0))
    record = Record(
        key=task.key,
        kind=task.kind,
        state="done",
        inputs=task.inputs,
        outputs=tiny_outputs(task.kind, task.inputs),
        timings={"seconds": 0.1},
    )
    store.put_record(record)
    return record


def tiny_outputs(kind: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "reference":
        return {"graphs": GRAPHS, "timesteps": list(range(901, 0, -100))}
    if kind == "images":
        return {"forwards": 40, "n_images": inputs["stop"] - inputs["start"]}
    if kind == "statistics":
        return {"n_images": 16, "feature_dim": 8}
    if kind == "search":
        spent = {"forwards": 3, "sample_forwards": 3.0, "seconds": 0.1}
        return {"outcome": _outcome(inputs), "curve": {}, **spent}
    if kind == "errors":
        return {"forwards": 5, "sample_forwards": 10.0, "seconds": 0.1}
    if kind == "race":
        return _race(inputs)
    share = np.mean([[c == "1" for c in row] for row in inputs["keep"]])
    if kind == "latency":
        names, values = ("latency_ms", "dense_latency_ms", "speedup"), (share, 1, 1 / share)
        return {name: _figure(value) for name, value in zip(names, values, strict=True)}
    metrics = {name: _figure(share) for name in inputs["protocol"]["metrics"]}
    return {
        "metrics": metrics,
        "macs": {"kept": round(1000 * share)},
        "pruned_ratio": 1 - share,
        "all_or_nothing_share": 1.0,
    }


def _race(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Let the fastest beat the slowest that nothing protects and whose speed is known."""
    known = [candidate for candidate in inputs["candidates"] if candidate["speed"] is not None]
    ordered = sorted(known, key=lambda c: (c["speed"], c["key"]))
    bars = {bar for candidate in inputs["candidates"] for bar in candidate["bars"]}
    winner = ordered[-1]["key"] if ordered else ""
    free = [c["key"] for c in ordered if not c["protected"] and c["key"] not in bars]
    lost = {"images": inputs["images"], "by": dict.fromkeys(inputs["metrics"], winner)}
    dropped = {key: lost for key in free[:1] if key != winner}
    kept = [c["key"] for c in inputs["candidates"] if c["key"] not in dropped]
    count = len(inputs["candidates"])
    return {"kept": kept, "dropped": dropped, "critical": 3.0, "candidates": count}


def _figure(value: float) -> dict[str, Any]:
    number = float(value)
    return {"value": number, "low": number - 0.1, "high": number + 0.1, "n": 16, "scorer": "tiny"}


def _outcome(inputs: Mapping[str, Any]) -> dict[str, Any]:
    search, spent = inputs["search"], {"forwards": 3, "sample_forwards": 3.0}
    if search["strategy"] == "best_step_mask":
        masks = {str(k): list(range(k)) for k in range(1, 10)}
        return {"scores": None, "step_masks": masks, **spent}
    if "target" in inputs:  # whole calls, as many as the budget holds
        kept = range(round(10 * (1 - inputs["target"])))
        gates = GateTable.from_calls(tuple(kept), 10, GRAPH.num_blocks)
        return {"tables": {str(inputs["target"]): gates.to_strings()}, **spent}
    seed = round(100 * search["loss"]["alpha"])
    scores = np.random.default_rng(seed).random((10, GRAPH.num_blocks))
    return {"scores": scores.tolist(), "step_masks": None, **spent}


class Listener:
    """An audience and an event log."""

    def __init__(self) -> None:
        self.landed_keys: list[str] = []
        self.results: list[RunResult] = []
        self.events: list[Event] = []
        self.started = 0

    def start(self, sweep: SweepFile, plan: Plan) -> None:
        self.started += 1

    def landed(self, record: Record, task: Task) -> None:
        self.landed_keys.append(record.key)

    def finish(self, result: RunResult) -> None:
        self.results.append(result)


def run(
    sweep: SweepFile, store: Store, task_function: Any = run_tiny_task
) -> tuple[RunResult, Listener]:
    listener = Listener()
    result = run_sweep(
        sweep,
        store,
        InProcessExecutor(),
        listener,
        listener.events.append,
        run_task=task_function,
        facts=tiny_facts(sweep),
    )
    return result, listener


def logging_task(log: Path, seconds: float) -> Any:
    """Run tiny tasks, writing down which were finished."""

    def run_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        time.sleep(seconds)
        record = run_tiny_task(task, store)
        with log.open("a") as file:
            file.write(f"{task.key}\n")
        return record

    return run_task
