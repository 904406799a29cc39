"""Sweeps of models that do not exist: tasks that only wait, with records of the real shape."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.evaluation.prompts import items_sha256
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.families import Scorers
from dipgo_core.gates import GateTable
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse
from dipgo_core.items import Item
from dipgo_core.subnet import SubNet, config_sha256
from orchestrator.facts import ItemSet, ModelFacts
from orchestrator.records import Record, Task
from orchestrator.store import Store
from orchestrator.sweep_settings import (
    AskedResources,
    Calibration,
    EvaluateSettings,
    PromptSource,
    Resources,
    SearchGrid,
    SweepFile,
    SweepModel,
    Tracking,
)

BLOCKS, CALLS, IMAGES = 28, 20, 16  # blocks of DiT-XL, calls of a usual sampler
GRAPH = BlockGraph(
    denoiser="DiTTransformer2DModel",
    granularity="block",
    blocks=(
        Block("", Reuse.SKIP, 1_000, 1_000),
        *(Block(f"transformer_blocks.{i}", Reuse.OUTPUT, 1_000, 900) for i in range(BLOCKS)),
    ),
    producers=((BLOCKS,), (INPUT,), *((i,) for i in range(1, BLOCKS))),
)


def made_up_sweep(
    name: str, *, models: int, weights: int, targets: Sequence[float], storage: str
) -> SweepFile:
    """Return a grid: `weights` searches a model, each of which serves all targets."""
    asked = AskedResources(cpus=1, gpus=0)
    return SweepFile(
        name=name,
        models=tuple(_model(f"model-{i}", weights, tuple(targets)) for i in range(models)),
        tracking=Tracking(experiment=name),
        storage=storage,
        resources=Resources(reference=asked, search=asked, evaluate=asked, score=asked),
    )


def _model(name: str, weights: int, targets: tuple[float, ...]) -> SweepModel:
    alphas = tuple(round(0.01 * (1 + i), 2) for i in range(weights))
    return SweepModel(
        name=name,
        family="dit",
        settings=ModelSettings(id=name),
        sampler=SamplerSettings(scheduler="ddim", steps=CALLS, guidance_scale=3.0),
        targets=targets,
        baselines=(),
        grid=SearchGrid(axes={"steps": (8,)}, losses=({"alpha": alphas},)),
        calibration=Calibration(
            prompts=PromptSource(kind="bundled", value="calibration"), images=IMAGES
        ),
        evaluate=EvaluateSettings(
            prompts=PromptSource(kind="bundled", value="test"),
            images=IMAGES,
            scorers=Scorers(features="tiny-features", clip="tiny-clip"),
            metrics=("psnr",),
        ),
    )


def made_up_facts(sweep: SweepFile) -> dict[str, ModelFacts]:
    """Return what a plan must know of models that do not exist."""
    scorer = Scorer("tiny", "0" * 64, "none")
    prompts = tuple(Item(f"prompt {i}") for i in range(IMAGES))
    items = ItemSet(sha256=items_sha256(prompts), count=len(prompts), items=prompts)
    return {
        model.name: ModelFacts(
            weights_sha256=hashlib.sha256(model.name.encode()).hexdigest(),
            height=32,
            width=32,
            test=items,
            calibration=items,
            scorers={"features": scorer, "clip": scorer},
        )
        for model in sweep.models
    }


@dataclass(frozen=True)
class Waits:
    """A task function that waits; the record follows from the inputs alone.

    seconds: of searches, shards and evaluations; dense runs take none, they only come before.
    log: gets a line a task with when it began and ended.
    """

    seconds: float
    log: Path | None = None

    def __call__(self, task: Task, store: Store, *, on_progress: Any = None) -> Record:
        began = time.time()
        dense = task.kind == "reference" or (task.kind == "images" and "keep" not in task.inputs)
        time.sleep(0 if dense else self.seconds)
        outputs, files = _made(task)
        record = Record(
            key=task.key,
            kind=task.kind,
            state="done",
            inputs=task.inputs,
            outputs=outputs,
            artifacts={n: store.put_artifact(task.key, n, data) for n, data in files.items()},
            timings={"seconds": self.seconds, "finished": time.time()},
            host={"pid": os.getpid(), "device": "none"},
        )
        store.put_record(record)
        if self.log is not None and not dense:
            line = json.dumps({"kind": task.kind, "began": began, "ended": time.time()})
            with self.log.open("a") as file:
                file.write(f"{line}\n")
        return record


def _made(task: Task) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Return outputs and artifacts of a task."""
    inputs = task.inputs
    if task.kind == "reference":
        graphs = {g: replace(GRAPH, granularity=g).to_json() for g in ("block", "layer")}
        return {"graphs": graphs, "timesteps": list(range(951, 0, -50))}, {}
    if task.kind == "images":
        return {"forwards": CALLS * (inputs["stop"] - inputs["start"])}, {}
    if task.kind == "search":
        rng = np.random.default_rng(round(100 * inputs["search"]["loss"]["alpha"]))
        outcome = {"scores": rng.random((CALLS, GRAPH.num_blocks)).tolist(), "step_masks": None}
        curve = {"search_step": [0, 1], "loss": [1.0, 0.5]}
        return {
            "outcome": {**outcome, "forwards": 8, "sample_forwards": 8.0},
            "curve": curve,
            "forwards": 8,
            "seconds": 1.0,
        }, {}
    return _evaluated(inputs)


def _evaluated(inputs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    kept = float(np.mean([[c == "1" for c in row] for row in inputs["keep"]]))
    psnr = 20 + 20 * kept + np.random.default_rng(round(1e6 * kept)).normal(0, 1, IMAGES)
    value = float(psnr.mean())
    figure = {"value": value, "low": value - 1, "high": value + 1, "n": IMAGES, "scorer": None}
    outputs = {
        "metrics": {"psnr": figure},
        "macs": {"kept": round(1e6 * kept)},
        "pruned_ratio": 1 - kept,
        "all_or_nothing_share": 0.0,
        "subnet": _subnet(inputs),
        "forwards": CALLS * IMAGES,
    }
    return outputs, {"per_image.safetensors": save({"psnr": psnr})}


def _subnet(inputs: Mapping[str, Any]) -> dict[str, Any]:
    gates, config = GateTable.from_strings(inputs["keep"]), {"sample_size": 8}
    digest = config_sha256(config)
    model = {
        **inputs["model"],
        "family": "dit",
        "denoiser": GRAPH.denoiser,
        "config": config,
        "config_sha256": digest,
    }
    steps = list(range(951, 0, -50))
    dense = GRAPH.macs(GateTable.all_keep(CALLS, GRAPH.num_blocks))
    kept = GRAPH.macs(gates)
    return SubNet(
        gates=gates,
        block_names=GRAPH.names,
        reuse=tuple(block.reuse for block in GRAPH.blocks),
        granularity="block",
        model=model,
        sampler={
            **inputs["sampler"],
            "config": config,
            "config_sha256": digest,
            "timesteps": steps,
        },
        macs={
            "dense": dense,
            "kept": kept,
            "pruned_ratio": 1 - kept / dense,
            "convention": "all",
        },
    ).to_json()
