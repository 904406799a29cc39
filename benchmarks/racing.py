"""Race thirty points, and check what racing costs and what it loses; writes racing/README.md.

    python benchmarks/racing.py [folder for storage, default benchmarks/.racing]

Two real runs: everything at the top rung, and raced. Then replays: the race's own decisions on the
stored scores, for other images in other orders, against the fronts of the same images.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from dipgo_core.evaluation.device import cpu_name
from dipgo_core.evaluation.intervals import Figure, Replicates, mean_replicates_of
from dipgo_core.evaluation.mmd_intervals import kid_replicates
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.evaluation.reference import load_statistics
from dipgo_core.zoo import reference_statistics_path
from orchestrator.driver import plan_sweep
from orchestrator.pareto import pareto_fronts
from orchestrator.plan import Plan
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.racing import Candidate, alpha_of_rung, decide
from orchestrator.records import Record
from orchestrator.rungs import candidates_of
from orchestrator.store import FolderStore
from orchestrator.sweep_file import load_sweep

HERE: Final = Path(__file__).resolve().parent
SWEEP: Final = HERE / "racing" / "thirty.yaml"
PROGRAM: Final = Path(sys.executable).with_name("dipgo-sweep")
RUNGS: Final = (100, 400, 1600)
SEEDS: Final = 20
METRICS: Final = ("kid", "clip", "psnr", "ssim")

Array = npt.NDArray[Any]
Fronts = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Results:
    """One run of the sweep: its plan, its records, its points, its store."""

    plan: Plan
    records: Mapping[str, Record]
    points: tuple[ResolvedPoint, ...]
    store: FolderStore


@dataclass(frozen=True)
class Pool:
    """Every evaluation's scores of the same images. prompts: of image i.  # (n,)

    scores: metric -> evaluation -> (n,). features: evaluation -> (n, d). real: (m, d).
    """

    prompts: Array
    scores: Mapping[str, Mapping[str, Array]]
    features: Mapping[str, Array]
    real: Array


@dataclass(frozen=True)
class Replay:
    """One race on the pool's images. fronts: of all points, by metric, as sets of evaluations."""

    kept: frozenset[str]
    images: int
    of: int
    fronts: Fronts

    @property
    def lost(self) -> dict[str, list[str]]:
        """Front points that were dropped, by metric."""
        return {m: sorted(front - self.kept) for m, front in self.fronts.items()}


def main() -> None:
    """Run, compare, replay, report; finished runs are not computed again."""
    place = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE / ".racing"
    place.mkdir(parents=True, exist_ok=True)
    run(place, place / "all", f"evaluate.images={RUNGS[-1]}")
    share_what_both_need(place / "all", place / "raced")
    run(place, place / "raced", f"evaluate.images={json.dumps(RUNGS)}")
    everything = results(place / "all", f"evaluate.images={RUNGS[-1]}")
    raced = results(place / "raced", f"evaluate.images={json.dumps(RUNGS)}")
    pool, candidates = pool_of(everything), candidates_in(everything)
    replays = {
        "all images": [replay(pool, candidates, everything, s, RUNGS) for s in range(SEEDS)],
        "half of them": [
            replay(pool, candidates, everything, s, tuple(n // 2 for n in RUNGS))
            for s in range(SEEDS)
        ],
    }
    found = {
        "machine": machine(),
        "real": real_run(everything, raced),
        "replays": {name: summary(each) for name, each in replays.items()},
    }
    (HERE / "racing" / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "racing" / "README.md").write_text(report(found), encoding="utf-8")


def run(place: Path, store: Path, override: str) -> None:
    """Run the sweep through the command line."""
    overrides = ["-o", f"storage={store}", "-o", override]
    subprocess.run(
        [str(PROGRAM), "run", str(SWEEP), "--executor", "local", *overrides], cwd=place, check=True
    )


def share_what_both_need(source: Path, target: Path) -> None:
    """Copy references, searches and calibration evaluations: the same tasks in both runs."""
    store = FolderStore(source)
    for key, record in store.records().items():
        split = record.inputs.get("protocol", {}).get("split")
        if record.kind == "evaluate" and split == "test":
            continue
        for part in (Path("records") / f"{key}.json", Path("artifacts") / key):
            if (source / part).exists() and not (target / part).exists():
                (target / part).parent.mkdir(parents=True, exist_ok=True)
                copy = shutil.copytree if (source / part).is_dir() else shutil.copy2
                copy(source / part, target / part)


def results(place: Path, override: str) -> Results:
    """Read what a run left."""
    sweep = load_sweep(SWEEP, [override, f"storage={place}"])
    store = FolderStore(place)
    plan, records = plan_sweep(sweep, store), store.records()
    assert plan.complete, "a task failed: run again"
    return Results(plan, records, resolve_points(plan.points, records, store), store)


# --- the real runs --------------------------------------------------------------------------------


def real_run(everything: Results, raced: Results) -> dict[str, Any]:
    """Compare the fronts of the two runs, and what they generated."""
    expected, found = (fronts_of(each.points) for each in (everything, raced))
    dropped = [point for point in raced.points if point.dropped]
    rungs = [p.dropped.images for p in dropped if p.dropped]
    spent, whole = generated(raced.records), generated(everything.records)
    return {
        "points": len(raced.points),
        "evaluations": len({p.evaluate_key for p in everything.points}),
        "dropped": {str(n): rungs.count(n) for n in RUNGS[:-1]},
        "images": spent,
        "images_of_everything": whole,
        "share": spent / whole,
        "same_front": {metric: found[metric] == expected[metric] for metric in expected},
        "front_points": {metric: len(front) for metric, front in expected.items()},
        "lost": {metric: len(expected[metric] - found[metric]) for metric in expected},
        "critical": [r.outputs["critical"] for r in raced.records.values() if r.kind == "race"],
        "names": [f"{p.name} at {p.target:g}: {p.dropped.images}" for p in dropped if p.dropped],
    }


def generated(records: Mapping[str, Record]) -> int:
    """Return how many test images were made: the reference's, and each evaluation's new ones.

    The dense run's are the reference's.
    """
    total = 0
    for record in records.values():
        if record.inputs.get("protocol", {}).get("split") != "test":
            continue
        if record.kind == "reference":
            total += int(record.outputs["n_images"])
        elif record.kind == "evaluate" and not is_dense(record):
            total += int(record.outputs["n_images"]) - int(record.outputs.get("n_continued", 0))
    return total


def is_dense(record: Record) -> bool:
    whole = all(set(row) == {"1"} for row in record.inputs["keep"])
    return whole and record.inputs["sampler"] == record.inputs["protocol"]["sampler"]


def fronts_of(points: Sequence[ResolvedPoint]) -> Fronts:
    """Return the evaluations on each front, by metric; points that share one are one."""
    subnets = {point.key: f"{point.subnet} {point.sampler}" for point in points}
    return {
        front.objectives[1]: frozenset(subnets[key] for key in front.points)
        for front in pareto_fronts(points, speed="macs_speedup")
    }


# --- the replays ----------------------------------------------------------------------------------


def pool_of(everything: Results) -> Pool:
    """Read the scores and features of every evaluation."""
    keys = sorted({str(point.evaluate_key) for point in everything.points})
    records = {key: everything.records[key] for key in keys}
    files = {
        name: {k: load(everything.store.get_artifact(r, name)) for k, r in records.items()}
        for name in ("per_image.safetensors", "features.safetensors")
    }
    protocol = Protocol.from_json(records[keys[0]].inputs["protocol"])
    reference = load_statistics(reference_statistics_path(), protocol.scorers["features"])
    assert reference.features is not None
    return Pool(
        prompts=np.arange(protocol.images) % protocol.num_items,
        scores={
            metric: {k: rows[metric] for k, rows in files["per_image.safetensors"].items()
                     if metric in rows}
            for metric in METRICS if metric != "kid"
        },
        features={k: rows["features"] for k, rows in files["features.safetensors"].items()},
        real=reference.features,
    )  # fmt: skip


def candidates_in(everything: Results) -> tuple[Candidate, ...]:
    """Return the candidates with the speeds and bars that a race of this sweep gives them."""
    points = everything.plan.points
    metrics = ("fid", *METRICS)
    return candidates_of(points, points, everything.records, by_latency=False, metrics=metrics)


def replay(
    pool: Pool,
    candidates: Sequence[Candidate],
    everything: Results,
    seed: int,
    rungs: tuple[int, ...],
) -> Replay:
    """Race on images drawn in a random order, as prompts come in turn, and see who is lost."""
    order = drawn(pool.prompts, rungs[-1], seed)
    running, images = list(candidates), 0
    for n, below in zip(rungs, (0, *rungs), strict=False):
        images += (n - below) * sum(not candidate.protected for candidate in running)
        if n < rungs[-1]:
            measured = {m: dict(replicates(pool, m, running, order[:n])) for m in METRICS}
            kept = decide(running, measured, alpha=alpha_of_rung(len(rungs)), top=rungs[-1]).kept
            running = [candidate for candidate in running if candidate.key in kept]
    dense = sum(candidate.protected for candidate in candidates) * rungs[-1]
    names = {str(p.evaluate_key): f"{p.subnet} {p.sampler}" for p in everything.points}
    return Replay(
        kept=frozenset(names[candidate.key] for candidate in running),
        images=images + dense,
        of=len(candidates) * rungs[-1],
        fronts=fronts_of(measured_on(pool, everything.points, order)),
    )


def drawn(prompts: Array, count: int, seed: int) -> Array:
    """Return images in a random order: all prompts once, in a random order, then all again."""
    rng = np.random.default_rng(seed)
    turns = np.empty(len(prompts))
    for prompt in np.unique(prompts):
        own = np.flatnonzero(prompts == prompt)
        turns[own] = rng.permutation(len(own)) + 0.0
    places = rng.permutation(len(np.unique(prompts)))[prompts]
    return np.lexsort((places, turns))[:count]


def replicates(
    pool: Pool, metric: str, candidates: Sequence[Candidate], order: Array
) -> Iterator[tuple[str, Replicates]]:
    """Yield the replicates of every candidate that has the metric, over the same images."""
    groups = np.arange(len(order))  # images, as in a race
    for key in (candidate.key for candidate in candidates):
        if metric == "kid":
            found = kid_replicates(pool.features[key][order], pool.real, groups)
        elif key in pool.scores[metric]:
            found = mean_replicates_of(pool.scores[metric][key][order], groups)
        else:
            continue
        assert found is not None
        yield key, found


def measured_on(pool: Pool, points: Sequence[ResolvedPoint], order: Array) -> list[ResolvedPoint]:
    """Return the points with the figures of these images: what the top rung says of them.

    KID over all images at once, without the draws of subsets; up to a constant of the reference.
    """
    kid = {
        key: float(found.values[0])
        for key, found in replicates(pool, "kid", [Candidate(key=k, speed=None)
                                                   for k in pool.features], order)
    }  # fmt: skip
    measured = []
    for point in points:
        key = str(point.evaluate_key)
        values = {m: float(pool.scores[m][key][order].mean())
                  for m in METRICS if m != "kid" and key in pool.scores[m]}  # fmt: skip
        figures = {
            metric: Figure(value, None, None, len(order))
            for metric, value in {**values, "kid": kid[key]}.items()
        }
        measured.append(replace(point, figures=figures))
    return measured


def summary(replays: Sequence[Replay]) -> dict[str, Any]:
    """Return how often something was lost, and what the races cost."""
    on_front = [sum(len(front) for front in each.fronts.values()) for each in replays]
    lost = [sum(len(keys) for keys in each.lost.values()) for each in replays]
    shares = [each.images / each.of for each in replays]
    return {
        "seeds": len(replays),
        "seeds_with_a_loss": sum(count > 0 for count in lost),
        "front_points": sum(on_front),
        "front_points_lost": sum(lost),
        "share": {"mean": float(np.mean(shares)), "least": min(shares), "most": max(shares)},
        "kept": [len(each.kept) for each in replays],
    }


# --- the page -------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    libraries = {name: version(name) for name in ("torch", "diffusers", "numpy")}
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        **libraries,
    }


def report(found: Mapping[str, Any]) -> str:
    """Return the page."""
    real, about = found["real"], found["machine"]
    rungs = ", ".join(map(str, RUNGS))
    lines = [
        "# Racing",
        "",
        "Written by `python benchmarks/racing.py` on "
        f"{about['cpu']} ({about['cores']} cores), {about['date']}; Python {about['python']}, "
        f"torch {about['torch']}, diffusers {about['diffusers']}.",
        "",
        "[thirty.yaml](thirty.yaml): tiny-sd, 30 points and the dense run, three targets, speed by "
        f"counted MACs. Rungs {rungs}, fixed before any result was seen.",
        "",
        "## Two real runs: raced, and everything at the top rung",
        "",
        f"Images generated: {real['images']:,} raced, {real['images_of_everything']:,} without: "
        f"**{real['share']:.1%}** (goal: at most 50 %). References, searches and calibration "
        "evaluations are the same tasks in both and were copied.",
        "",
        *(f"Dropped at {n} images: {count} of {real['points']} points."
          for n, count in real["dropped"].items()),
        "",
        "| metric | points on the front | same front when raced | lost |",
        "|---|---|---|---|",
        *(f"| {metric} | {real['front_points'][metric]} | {'yes' if same else 'no'} | "
          f"{real['lost'][metric]} |" for metric, same in real["same_front"].items()),
        "",
        "FID takes no part in a race: a point may be dropped that is on the front of FID.",
        "",
        "## Replays: other images, other orders",
        "",
        f"The same decisions on the stored scores, {SEEDS} times. *All images*: the race meets the "
        f"{RUNGS[-1]} images in a random order; the fronts it is judged by are always the same. "
        f"*Half of them*: {RUNGS[-1] // 2} images are drawn, with rungs half as large; each race "
        "is judged by fronts of its own.",
        "",
        "| images | races | with any front point dropped | front points dropped | images "
        "generated |",
        "|---|---|---|---|---|",
        *(f"| {name} | {each['seeds']} | {each['seeds_with_a_loss']} | "
          f"{each['front_points_lost']} of {each['front_points']} | {each['share']['mean']:.1%} "
          f"({each['share']['least']:.1%} to {each['share']['most']:.1%}) |"
          for name, each in found["replays"].items()),
        "",
        "Front points are counted once a metric (KID, CLIP score, PSNR, SSIM). Goal: dropped in at "
        "most 5 % of the races.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
