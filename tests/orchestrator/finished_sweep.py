"""A finished sweep in a store: made-up images, features and figures that follow from the gates.

The images are stripes with noise that grows with the skipped share, the features move the same
way, so that figures, intervals and gains hang together as they do after a real sweep.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save

from dipgo_core.evaluation.fid_intervals import fid_jackknife
from dipgo_core.evaluation.intervals import Interval, bootstrap_mean
from dipgo_core.evaluation.metrics import PAIRED
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.gates import GateTable
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse
from dipgo_core.subnet import SubNet, config_sha256
from orchestrator.facts import ModelFacts
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.records import Record, Task
from orchestrator.store import Store
from orchestrator.sweep_settings import SweepFile
from orchestrator.task.explore import run_explore
from orchestrator.task.race import run_race
from orchestrator.task.work import Work
from tests.orchestrator.tiny_sweep import item_set, tiny_facts

NAMES = (
    "", "down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block",
    "up_blocks.0", "up_blocks.1", "up_blocks.2", "up_blocks.3",
)  # fmt: skip
GRAPH = BlockGraph(
    denoiser="UNet2DConditionModel",
    granularity="block",
    blocks=tuple(
        Block(name, Reuse.OUTPUT if name else Reuse.SKIP, 1_000_000, 900_000) for name in NAMES
    ),
    producers=(
        (9,), (INPUT,), (1,), (2,), (3,), (4,), (5, 4), (6, 3), (7, 2), (8, 1),
    ),
)  # fmt: skip
DIM = 8
MOST = 4096  # images
Fails = Callable[[Task], bool]


@dataclass(frozen=True)
class Finished:
    """What is left when a sweep has ended."""

    sweep: SweepFile
    plan: Plan
    store: Store


def finish(sweep: SweepFile, store: Store, *, fails: Fails = lambda task: False) -> Finished:
    """Run a sweep with made-up results until nothing is ready; tasks that `fails` names, fail."""
    facts = sweep_facts(sweep)
    failed: set[str] = set()
    while True:
        plan = build_plan(sweep, store.records(), facts=facts, device="a quiet cpu")
        ready = [task for task in plan.ready if task.key not in failed]
        if not ready:
            return Finished(sweep, plan, store)
        for task in ready:
            store.put_task(task)
            if fails(task):
                failed.add(task.key)
                store.put_failure(_record(task, state="failed", error="out of memory"))
            else:
                _run(task, store)


def run_finished_task(task: Task, store: Store, *, on_progress: Any = None) -> Record:
    """Run a task with made-up results, as an executor calls it."""
    _run(task, store)
    return store.records()[task.key]


def sweep_facts(sweep: SweepFile) -> dict[str, ModelFacts]:
    """Return facts with enough prompts for intervals."""
    prompts = item_set(*(f"prompt {i}" for i in range(64)))
    return {name: replace(fact, test=prompts) for name, fact in tiny_facts(sweep).items()}


def _record(task: Task, **changes: Any) -> Record:
    fields: dict[str, Any] = {
        "key": task.key,
        "kind": task.kind,
        "state": "done",
        "inputs": task.inputs,
        "host": {"name": "here"},
        "versions": {"dipgo-sweep": "0.1.0"},
    }
    return Record(**(fields | changes))


def _run(task: Task, store: Store) -> None:
    decides = {"race": run_race, "explore": run_explore}.get(task.kind)
    if decides is not None:
        found = decides(Work(task, store, lambda report: None))
        store.put_record(_record(task, outputs=found.outputs, timings={"seconds": 1.0}))
        return
    outputs, files = OUTPUTS[task.kind](task.inputs)
    digests = {name: store.put_artifact(task.key, name, data) for name, data in files.items()}
    if task.kind == "evaluate":
        outputs["statistics"] = task.options["statistics"]
    seconds = {
        "reference": 1.0,
        "images": 20.0,
        "statistics": 2.0,
        "errors": 6.0,
        "search": 110.0,
        "evaluate": 2.0,
        "latency": 3.0,
    }[task.kind]
    store.put_record(
        _record(task, outputs=outputs, artifacts=digests, timings={"seconds": seconds})
    )


Made = tuple[dict[str, Any], dict[str, bytes]]


def _reference(inputs: Mapping[str, Any]) -> Made:
    return {
        "graphs": {"block": GRAPH.to_json()},
        "timesteps": list(range(901, 0, -100)),
        "forwards": 40,
    }, {}


def _images(inputs: Mapping[str, Any]) -> Made:
    return {"forwards": 40, "n_images": inputs["stop"] - inputs["start"]}, {}


def _statistics(inputs: Mapping[str, Any]) -> Made:
    rows = _features(inputs["protocol"]["images"], 0.0, np.random.default_rng(0))
    return {}, {"features.safetensors": save({inputs["role"]: rows.astype(np.float32)})}


def _search(inputs: Mapping[str, Any]) -> Made:
    search = inputs["search"]
    curve = {
        "search_step": list(range(40)),
        "loss": [1.0 / (1 + step) + 0.2 for step in range(40)],
    }
    spent = {"forwards": 400, "sample_forwards": 400.0}
    outcome: dict[str, Any] = {"scores": None, "step_masks": None, **spent}
    if search["strategy"] == "best_step_mask":
        masks = {str(k): [round(i * 9 / k) for i in range(k)] for k in range(1, 10)}
        outcome["step_masks"] = masks
    elif "target" in inputs:
        kept = tuple(range(round(10 * (1 - inputs["target"]))))
        rows = GateTable.from_calls(kept, 10, len(NAMES)).to_strings()
        outcome["tables"] = {str(inputs["target"]): rows}
    else:
        rng = np.random.default_rng(round(100 * search["loss"]["alpha"]) + search["seed"])
        scores = rng.random((10, len(NAMES))) + np.linspace(0.6, 0, len(NAMES))
        scores[0] = 1.6
        outcome["scores"] = (scores / 1.6).tolist()
    return {"outcome": outcome, "curve": curve, **spent, "seconds": 100.0}, {}


def _errors(inputs: Mapping[str, Any]) -> Made:
    return {"forwards": 50, "sample_forwards": 90.0, "seconds": 5.0}, {}


def _evaluate(inputs: Mapping[str, Any]) -> Made:
    gates = GateTable.from_strings(inputs["keep"])
    damage = _damage(gates)
    count = inputs["protocol"]["images"]
    prompts = np.arange(count) % inputs["protocol"]["num_items"]
    rng = np.random.default_rng(int(gates.digest[:8], 16))
    difficulty = np.random.default_rng(1).normal(0, 1, count)
    noise = rng.normal(0, 0.3, (3, MOST))[:, :count]  # the first ones of any number are the same
    per_image = {
        "clip": 92.0 + 2 * difficulty - 9 * damage + noise[0],
        "psnr": np.minimum(100.0, 38 - 25 * damage + difficulty + noise[1]),
        "ssim": np.clip(0.99 - 0.5 * damage + 0.01 * difficulty + 0.01 * noise[2], 0, 1),
    }
    features = _features(count, damage, rng)
    dense = _features(count, 0.0, np.random.default_rng(0))
    wanted = inputs["protocol"]["metrics"]
    metrics = {name: _mean(values, prompts) for name, values in per_image.items() if name in wanted}
    for name in set(PAIRED) & set(metrics):
        metrics[name]["scorer"] = None
    if "fid" in wanted:
        found = fid_jackknife(features, dense, prompts, paired=True)
        value = (
            float(((features - dense).mean(axis=0) ** 2).sum()) if found is None else found.value
        )
        low, high = (None, None) if found is None else (found.low, found.high)
        metrics["fid"] = _figure(max(0.01, value), low, high, count)
        if found is not None:
            metrics["fid_infinity"] = _figure(max(0.005, value - 0.005), low, high, count)
    if "kid" in wanted:
        value = float(((features - dense).mean(axis=0) ** 2).sum())
        metrics["kid"] = _figure(value / 80, None, None, count)
    digest = Protocol.from_json(inputs["protocol"]).hash
    outputs = {
        "metrics": {name: {**figure, "protocol": digest} for name, figure in metrics.items()},
        "subnet": _subnet(inputs, gates).to_json(),
        "macs": {"kept": GRAPH.macs(gates)},
        "pruned_ratio": GRAPH.pruned_ratio(gates),
        "all_or_nothing_share": gates.all_or_nothing_share,
    }
    files = {
        "per_image.safetensors": save(per_image),
        "features.safetensors": save({"features": features.astype(np.float32)}),
        "samples.safetensors": save({"images": _stripes(damage, rng)}),
    }
    return outputs, files


def _latency(inputs: Mapping[str, Any]) -> Made:
    gates = GateTable.from_strings(inputs["keep"])
    dense = GRAPH.macs(GateTable.all_keep(10, gates.num_blocks))
    share = 0.08 + 0.92 * GRAPH.macs(gates) / dense
    times = {"latency_ms": 40 * share, "dense_latency_ms": 40.0, "speedup": 1 / share}
    times |= {"loop_ms": 36 * share, "loop_speedup": 1.1 / share, "images_per_second": 25 / share}
    figures = {name: _figure(v, v * 0.97, v * 1.03, 20) for name, v in times.items()}
    memory = {"pruned": {"resident": 700 * 2**20}}
    return {**figures, "memory": memory, "energy": {"pruned_j": 2.5 * share}}, {}


OUTPUTS: Mapping[str, Callable[[Mapping[str, Any]], Made]] = {
    "reference": _reference, "images": _images, "statistics": _statistics, "errors": _errors,
    "search": _search, "evaluate": _evaluate, "latency": _latency,
}  # fmt: skip


def _damage(gates: GateTable) -> float:
    """Return how bad the images are: 0 for the dense run, more for what was skipped late."""
    weights = np.linspace(1.2, 0.8, gates.num_calls)[:, None]
    skipped = float((weights * ~gates.keep).mean())
    chance = int(hashlib.sha256(gates.digest.encode()).hexdigest()[:4], 16) / 65535
    short = 0.08 * (10 - gates.num_calls) / 10
    return (skipped + 0.8 * (10 - gates.num_calls) / 10) ** 2 * (0.55 + 0.25 * chance) + short


def _features(count: int, damage: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    base = np.random.default_rng(7).normal(0, 1, (count, DIM))
    return base + 2.5 * damage + damage * rng.normal(0, 0.6, (count, DIM))


def _stripes(damage: float, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    grid = np.linspace(0, 6, 32)
    phases = np.arange(8)[:, None, None, None]
    colour = np.array([1.0, 0.6, 0.3])[None, :, None, None]
    waves = 0.5 + 0.5 * np.sin(grid[None, None, None, :] + phases) * colour
    images = waves + np.zeros((8, 3, 32, 32)) + damage * rng.normal(0, 0.5, (8, 3, 32, 32))
    return (np.clip(images, 0, 1) * 255).astype(np.uint8)


def _mean(values: npt.NDArray[np.float64], prompts: npt.NDArray[np.int64]) -> dict[str, Any]:
    found = bootstrap_mean(values, prompts) or Interval(float(values.mean()), 0.0, 0.0)
    return _figure(found.value, found.low, found.high, len(values))


def _figure(value: float, low: float | None, high: float | None, n: int) -> dict[str, Any]:
    return {"value": float(value), "low": low, "high": high, "n": n, "scorer": "tiny"}


def _subnet(inputs: Mapping[str, Any], gates: GateTable) -> SubNet:
    config: dict[str, Any] = {"sample_size": 8}
    steps = gates.num_calls
    return SubNet(
        gates=gates,
        block_names=NAMES,
        reuse=tuple(block.reuse for block in GRAPH.blocks),
        granularity="block",
        model={
            **inputs["model"],
            "family": "sd",
            "denoiser": "UNet2DConditionModel",
            "config": config,
            "config_sha256": config_sha256(config),
        },
        sampler={
            **inputs["sampler"],
            "config": {},
            "config_sha256": config_sha256({}),
            "timesteps": [1 + 1000 // steps * i for i in reversed(range(steps))],
        },
        macs={
            "dense": GRAPH.macs(GateTable.all_keep(steps, len(NAMES))),
            "kept": GRAPH.macs(gates),
            "pruned_ratio": GRAPH.pruned_ratio(gates),
            "convention": "all",
        },
    )
