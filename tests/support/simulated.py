"""A sweep of large images whose generator is simulated: everything else is what users run.

Reference, features of the reference, and one evaluation of tiny-sd go through their tasks and a
store in a folder; the pipeline call is replaced by random pixels, the extractor by 2,048 of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.evaluation import evaluate
from dipgo_core.evaluation.generate import GeneratedBatch
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.families import Scorers
from orchestrator.facts import ModelFacts, gather_facts
from orchestrator.plan import build_plan
from orchestrator.records import Record, Task
from orchestrator.store import open_store
from orchestrator.sweep_settings import (
    Baseline,
    Calibration,
    EvaluateSettings,
    PromptSource,
    Resources,
    SearchGrid,
    SweepFile,
    SweepModel,
    Tracking,
)
from orchestrator.task import run_task

SIDE = 512
DIM = 2048
SCORER = Scorer("every-383rd-value", "0" * 64, "none")
#: The tasks that are run after their shards, in order, by kind: how their labels end.
LABELS = {"reference": "images, test", "statistics": SCORER.id, "evaluate": "uniform at 0.5"}
_NOISE = np.random.default_rng(0).integers(0, 256, 2**23, dtype=np.uint8)


class StridedFeatures:
    """2,048 values of an image: what an extractor leaves, at no cost."""

    scorer = SCORER

    def __call__(self, images: Tensor) -> npt.NDArray[np.float32]:
        rows = images.flatten(1)
        step = rows.shape[1] // DIM
        return np.ascontiguousarray(rows[:, : DIM * step : step].float().cpu().numpy() / 255)


def generate_noise(
    model: Any, items: Sequence[Any], seeds: Sequence[int], sampler: Any, **arguments: Any
) -> Iterator[GeneratedBatch]:
    """Stand in for `generate`: pixels that follow from the seed, and on whether gates are given."""
    size, gated = arguments.get("batch_size", 16), arguments.get("gates") is not None
    for start in range(0, len(seeds), size):
        images = np.stack([_image(seed, gated) for seed in seeds[start : start + size]])
        latents = torch.zeros(len(images), 4, SIDE // 8, SIDE // 8)
        yield GeneratedBatch(start, torch.from_numpy(images), latents, forwards=1)


def _image(seed: int, gated: bool) -> npt.NDArray[np.uint8]:
    """A window of the noise; a SubNet's image has every second row of another window."""
    pixels = _window(seed)
    if gated:
        pixels[:, ::2] = _window(seed + 1)[:, ::2]
    return pixels


def _window(seed: int) -> npt.NDArray[np.uint8]:
    count = 3 * SIDE * SIDE
    first = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4]) % (len(_NOISE) - count)
    return _NOISE[first : first + count].reshape(3, SIDE, SIDE).copy()


@contextmanager
def simulated() -> Iterator[None]:
    """Replace pipeline calls and the feature extractor while the block runs."""
    generate, loaders = evaluate.generate, dict(evaluate.LOADERS)
    evaluate.generate = generate_noise
    evaluate.LOADERS["features"] = lambda name, device: StridedFeatures()
    try:
        yield
    finally:
        evaluate.generate = generate
        evaluate.LOADERS.update(loaders)


def run_simulated(
    folder: Path, images: int, metrics: Sequence[Any], *, images_per_shard: int = 500
) -> Iterator[tuple[Task, Record]]:
    """Yield the tasks of a small sweep with their records, each when it is done."""
    sweep, store = _sweep(images, metrics, images_per_shard), open_store(folder)
    facts = gather_facts(sweep)
    known = {name: _large(fact) for name, fact in facts.items()}
    store.put_blob(facts["tiny-sd"].test.blob())
    with simulated():
        for kind in LABELS:
            plan = build_plan(sweep, store.records(), facts=known, device="none")
            tasks = {each.key: each.task for each in plan.tasks if each.task is not None}
            wanted = (task for task in tasks.values() if task.kind == kind)
            last = next(task for task in wanted if task.label.endswith(LABELS[kind]))
            shards = [tasks[key] for key in last.options.get("shards", ())]
            for task in (*shards, last):
                yield task, run_task(task, store)


def _large(facts: ModelFacts) -> ModelFacts:
    scorers = {role: SCORER if role == "features" else one for role, one in facts.scorers.items()}
    return replace(facts, height=SIDE, width=SIDE, scorers=scorers)


def _sweep(images: int, metrics: Sequence[Any], images_per_shard: int) -> SweepFile:
    model = SweepModel(
        name="tiny-sd",
        family="sd",
        settings=ModelSettings(id="tiny-sd"),
        sampler=SamplerSettings(scheduler="ddim", steps=4, guidance_scale=3.0),
        targets=(0.5,),
        baselines=(Baseline(name="uniform"),),
        grid=SearchGrid(axes={"steps": (8,)}),
        calibration=Calibration(prompts=PromptSource(kind="bundled", value="calibration")),
        evaluate=EvaluateSettings(
            prompts=PromptSource(kind="bundled", value="test"),
            images=images,
            scorers=Scorers(features="tiny-features", clip="tiny-clip"),
            metrics=tuple(metrics),
        ),
    )
    resources = Resources(images_per_shard=images_per_shard)
    return SweepFile(
        name="simulated", models=(model,), resources=resources, tracking=Tracking(experiment="none")
    )
