"""Race thirty points, and check what racing costs and what it loses; writes racing/README.md.

    python benchmarks/racing.py [folder for storage, default benchmarks/.racing]

First everything is evaluated at the top rung, then the sweep is raced in the same store: what the
lower rungs need is taken from images that are there. Then replays: the same decisions on the stored
scores, for other images in other orders, against the fronts of the same images.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
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
from orchestrator.planned import Plan
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.racing import Candidate, Measured, alpha_of_rung, decide
from orchestrator.records import Record
from orchestrator.rungs import candidates_of
from orchestrator.store import Store, open_store
from orchestrator.sweep_file import load_sweep

HERE: Final = Path(__file__).resolve().parent
SWEEP: Final = HERE / "racing" / "thirty.yaml"
PROGRAM: Final = Path(sys.executable).with_name("dipgo-sweep")
RUNGS: Final = (100, 400, 1600)
SEEDS: Final = 20
METRICS: Final = ("kid", "clip", "psnr", "ssim")
#: All, KID and the distances to the dense images, those distances, and each metric alone.
RACED: Final = (
    METRICS,
    ("kid", "psnr", "ssim"),
    ("psnr", "ssim"),
    *((metric,) for metric in METRICS),
)
#: What is raced through the command line too; the last is the sweep's own objective.
REAL: Final = (METRICS, ("psnr", "ssim"), ("psnr",))

Array = npt.NDArray[Any]
Fronts = Mapping[str, frozenset[str]]


@dataclass(frozen=True)
class Results:
    """One run of the sweep: its plan, its records, its points, its store."""

    plan: Plan
    records: Mapping[str, Record]
    points: tuple[ResolvedPoint, ...]
    store: Store


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
    share: float
    fronts: Fronts

    def lost(self, metrics: Sequence[str]) -> int:
        """Return how many front points were dropped, each counted once a metric."""
        return sum(len(self.fronts[metric] - self.kept) for metric in metrics)


def main() -> None:
    """Run, compare, replay, report; finished runs are not computed again."""
    place = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE / ".racing"
    place.mkdir(parents=True, exist_ok=True)
    everything = results(place, f"evaluate.images={RUNGS[-1]}")
    pool, candidates = pool_of(everything), candidates_in(everything)
    halves = tuple(n // 2 for n in RUNGS)
    found = {
        "machine": machine(),
        "real": [
            real_run(
                everything,
                results(
                    place,
                    f"evaluate.images={json.dumps(RUNGS)}",
                    f"evaluate.race={json.dumps(metrics)}",
                ),
                metrics,
            )
            for metrics in REAL
        ],
        "replays": [
            row for rungs in (RUNGS, halves) for row in replays(pool, candidates, everything, rungs)
        ],
    }
    (HERE / "racing" / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    (HERE / "racing" / "README.md").write_text(report(found), encoding="utf-8")


def results(place: Path, *overrides: str) -> Results:
    """Run the sweep through the command line, and read what it left."""
    settings = [*overrides, f"storage={place / '.dipgo'}"]
    flags = [part for setting in settings for part in ("-o", setting)]
    subprocess.run(
        [str(PROGRAM), "run", str(SWEEP), "--executor", "local", *flags], cwd=place, check=True
    )
    sweep = load_sweep(SWEEP, settings)
    store = open_store(sweep.storage)
    plan, records = plan_sweep(sweep, store), store.records()
    assert plan.complete, "a task failed: run again"
    return Results(plan, records, resolve_points(plan.points, records, store), store)


# --- the real runs --------------------------------------------------------------------------------


def real_run(everything: Results, raced: Results, metrics: tuple[str, ...]) -> dict[str, Any]:
    """Compare the fronts of the two runs, and what a race alone would have generated."""
    expected, found = (fronts_of(each.points) for each in (everything, raced))
    reached = {names_of(raced)[p.key]: p.images or 0 for p in raced.plan.points}
    dropped = [p.dropped.images for p in raced.plan.points if p.dropped]
    races = {key for point in raced.plan.points for key in point.race_keys}
    return {
        "metrics": metrics,
        "points": len(raced.points),
        "evaluations": len(reached),
        "dropped": {str(n): dropped.count(n) for n in RUNGS[:-1]},
        "images": sum(reached.values()),
        "images_of_everything": RUNGS[-1] * len(reached),
        "share": sum(reached.values()) / (RUNGS[-1] * len(reached)),
        "front_points": {metric: len(front) for metric, front in expected.items()},
        "lost": {metric: len(expected[metric] - found[metric]) for metric in expected},
        "same_front": {metric: found[metric] == expected[metric] for metric in expected},
        "critical": [raced.records[key].outputs["critical"] for key in sorted(races)],
        "names": [f"{p.label}: {p.dropped.images}" for p in raced.plan.points if p.dropped],
    }


def names_of(run: Results) -> dict[str, str]:
    """Name the SubNet of every point; points that share their images share it."""
    return {point.key: f"{point.subnet} {point.sampler}" for point in run.points}


def fronts_of(points: Sequence[ResolvedPoint]) -> Fronts:
    """Return the SubNets on each front, by metric."""
    names = {point.key: f"{point.subnet} {point.sampler}" for point in points}
    return {
        front.objectives[1]: frozenset(names[key] for key in front.points)
        for front in pareto_fronts(points, speed="macs_speedup")
    }


# --- the replays ----------------------------------------------------------------------------------


def pool_of(everything: Results) -> Pool:
    """Read the scores and features of every evaluation."""
    keys = sorted({str(point.evaluate_key) for point in everything.points})
    records = {key: everything.records[key] for key in keys}
    scores, features = (
        {k: load(everything.store.get_artifact(r, name)) for k, r in records.items()}
        for name in ("per_image.safetensors", "features.safetensors")
    )
    protocol = Protocol.from_json(records[keys[0]].inputs["protocol"])
    reference = load_statistics(reference_statistics_path(), protocol.scorers["features"])
    assert reference.features is not None
    return Pool(
        prompts=np.arange(protocol.images) % protocol.num_items,
        scores={
            metric: {key: rows[metric] for key, rows in scores.items() if metric in rows}
            for metric in METRICS
            if metric != "kid"
        },
        features={key: rows["features"] for key, rows in features.items()},
        real=reference.features,
    )


def candidates_in(everything: Results) -> tuple[Candidate, ...]:
    """Return the candidates with the speeds and bars that a race of this sweep gives them."""
    points, metrics = everything.plan.points, ("fid", *METRICS)
    return candidates_of(points, points, everything.records, by_latency=False, metrics=metrics)


def replays(
    pool: Pool, candidates: Sequence[Candidate], everything: Results, rungs: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Race with every choice of raced metrics, for every seed; one row a choice."""
    raced: dict[tuple[str, ...], list[Replay]] = {metrics: [] for metrics in RACED}
    for seed in range(SEEDS):
        order = drawn(pool.prompts, rungs[-1], seed)
        fronts = fronts_of(measured_on(pool, everything.points, order))
        measured = {n: replicates(pool, order[:n], np.arange(n)) for n in rungs[:-1]}
        for metrics, done in raced.items():
            kept, share = replay(candidates, measured, rungs, metrics)
            names = names_of(everything)
            survivors = {names[p.key] for p in everything.points if p.evaluate_key in kept}
            done.append(Replay(frozenset(survivors), share, fronts))
    count = len(candidates)
    return [summary(rungs, metrics, done, count) for metrics, done in raced.items()]


def replay(
    candidates: Sequence[Candidate],
    measured: Mapping[int, Measured],
    rungs: tuple[int, ...],
    metrics: tuple[str, ...],
) -> tuple[frozenset[str], float]:
    """Return who reaches the top, and the share of all images that this takes."""
    running = list(candidates)
    images = rungs[0] * len(running)
    for n, above in zip(rungs, rungs[1:], strict=False):
        keys = {candidate.key for candidate in running}
        known = {m: {k: r for k, r in measured[n][m].items() if k in keys} for m in metrics}
        kept = decide(running, known, alpha=alpha_of_rung(len(rungs)), top=rungs[-1]).kept
        running = [candidate for candidate in running if candidate.key in kept]
        images += (above - n) * len(running)
    return frozenset(candidate.key for candidate in running), images / (rungs[-1] * len(candidates))


def drawn(prompts: Array, count: int, seed: int) -> Array:
    """Return images in a random order: all prompts once, in a random order, then all again."""
    rng = np.random.default_rng(seed)
    turns = np.empty(len(prompts))
    for prompt in np.unique(prompts):
        own = np.flatnonzero(prompts == prompt)
        turns[own] = rng.permutation(len(own))
    places = rng.permutation(len(np.unique(prompts)))[prompts]
    return np.lexsort((places, turns))[:count]


def replicates(pool: Pool, images: Array, groups: Array) -> dict[str, dict[str, Replicates]]:
    """Return the replicates of every metric and evaluation over the same images."""
    found: dict[str, dict[str, Replicates | None]] = {
        metric: {key: mean_replicates_of(rows[images], groups) for key, rows in known.items()}
        for metric, known in pool.scores.items()
    }
    found["kid"] = {
        key: kid_replicates(rows[images], pool.real, groups) for key, rows in pool.features.items()
    }
    return {
        metric: {key: one for key, one in known.items() if one is not None}
        for metric, known in found.items()
    }


def measured_on(pool: Pool, points: Sequence[ResolvedPoint], images: Array) -> list[ResolvedPoint]:
    """Return the points with the figures of these images: what the top rung says of them.

    KID over all pairs, not over draws of subsets, and up to a constant of the reference.
    """
    known = replicates(pool, images, pool.prompts[images])
    measured = []
    for point in points:
        key = str(point.evaluate_key)
        figures = {
            metric: Figure(float(each[key].values[0]), None, None, len(images))
            for metric, each in known.items()
            if key in each
        }
        measured.append(replace(point, figures=figures, state="done"))
    return measured


def summary(
    rungs: tuple[int, ...], metrics: tuple[str, ...], done: Sequence[Replay], evaluations: int
) -> dict[str, Any]:
    """Return how often something was lost, and what the races cost."""
    lost = [each.lost(metrics) for each in done]
    shares = [each.share for each in done]
    on_front = [len(frozenset().union(*(each.fronts[m] for m in metrics))) for each in done]
    first = rungs[0] / rungs[-1]
    return {
        "rungs": rungs,
        "metrics": metrics,
        "races": len(done),
        "races_with_a_loss": sum(count > 0 for count in lost),
        "front_points": sum(len(each.fronts[metric]) for each in done for metric in metrics),
        "front_points_lost": sum(lost),
        "share": {"mean": float(np.mean(shares)), "least": min(shares), "most": max(shares)},
        "kept": float(np.mean([len(each.kept) for each in done])),
        "on_a_front": float(np.mean(on_front)),
        "hindsight": first + (1 - first) * float(np.mean(on_front)) / evaluations,
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
    first, about = found["real"][0], found["machine"]
    rungs = ", ".join(map(str, RUNGS))
    lines = [
        "# Racing",
        "",
        "Written by `python benchmarks/racing.py` on "
        f"{about['cpu']} ({about['cores']} cores), {about['date']}; Python {about['python']}, "
        f"torch {about['torch']}, diffusers {about['diffusers']}.",
        "",
        "[thirty.yaml](thirty.yaml): tiny-sd, 30 points and the dense run (some share their "
        f"images: {first['evaluations']} evaluations), three targets, speed by counted MACs. "
        f"Rungs {rungs}.",
        "",
        "## Raced, against everything at the top rung",
        "",
        f"Everything at the top rung is {first['images_of_everything']:,} images. All runs went "
        "through the command line and one store; the lower rungs took images that the first run "
        "had made, so what a race generates is counted from the rung that each evaluation reached.",
        "",
        "| raced on | images | share | points dropped | front points lost, by metric |",
        "|---|---|---|---|---|",
        *(_real_row(each) for each in found["real"]),
        "",
        "FID takes no part in a race: a point may be dropped that is on the front of FID. So may "
        "one that is on the front of a metric which the race does not look at.",
        "",
        "## Replays: other images, other orders",
        "",
        f"The same decisions on the stored scores, {SEEDS} times each. With rungs up to "
        f"{RUNGS[-1]} the race meets all images in a random order, and the fronts it is judged by "
        f"are always the same; with rungs half as large, {RUNGS[-1] // 2} images are drawn, and "
        "each race is judged by fronts of its own. A front point is lost if it was dropped; it "
        "is counted once a metric.",
        "",
        "| raced on | rungs | images generated | with hindsight | evaluations kept | on a front | "
        "front points lost | races with a loss |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(each) for each in found["replays"]),
        "",
    ]
    return "\n".join([*lines, *_verdict(found)]) + "\n"


def _real_row(each: Mapping[str, Any]) -> str:
    dropped = ", ".join(f"{count} at {n}" for n, count in each["dropped"].items())
    lost = ", ".join(
        f"{metric} {count} of {each['front_points'][metric]}"
        for metric, count in each["lost"].items()
    )
    cells = (
        ", ".join(each["metrics"]),
        f"{each['images']:,}",
        f"**{each['share']:.0%}**",
        dropped,
        lost,
    )
    return f"| {' | '.join(cells)} |"


def _row(each: Mapping[str, Any]) -> str:
    share = each["share"]
    cells = (
        ", ".join(each["metrics"]),
        ", ".join(map(str, each["rungs"])),
        f"{share['mean']:.0%} ({share['least']:.0%} to {share['most']:.0%})",
        f"{each['hindsight']:.0%}",
        f"{each['kept']:.1f}",
        f"{each['on_a_front']:.1f}",
        f"{each['front_points_lost']} of {each['front_points']}",
        f"{each['races_with_a_loss']} of {each['races']}",
    )
    return f"| {' | '.join(cells)} |"


def _verdict(found: Mapping[str, Any]) -> list[str]:
    """Say what became of the two goals."""
    rows = found["replays"]
    lost, races = (sum(each[name] for each in rows) for name in ("races_with_a_loss", "races"))
    shares: dict[tuple[str, ...], list[float]] = {metrics: [] for metrics in RACED}
    for each in rows:
        shares[tuple(each["metrics"])].append(each["share"]["mean"])
    return [
        "**Goal: a front point is lost in at most 5 % of the races.** "
        f"{'Met' if lost <= 0.05 * races else 'Missed'}: {lost} of {races}.",
        "",
        "**Goal: at most 50 % of the images.**",
        "",
        *(
            f"- {'met' if max(known) <= 0.5 else 'missed'} raced on {', '.join(metrics)}: "
            f"{' and '.join(f'{share:.0%}' for share in known)} (rungs up to {RUNGS[-1]}, and half)"
            for metrics, known in shares.items()
        ),
        "",
        "What a race saves is what its metrics tell apart. The paired differences (PSNR, SSIM) "
        "separate these points early; their KID and CLIP scores lie within the noise of some "
        "hundred images of each other, and a race that must keep the front of every metric keeps "
        "whatever one of them cannot tell apart. *With hindsight* is the share if exactly the "
        "points on some front of the raced metrics went on after the first rung. The sweep, its "
        "metrics and its rungs were fixed before any result was seen; that single images are "
        "resampled, not prompts, was decided after first replays, which dropped still less, and so "
        "was racing on fewer of the metrics. A sweep races on the quality of its `objective` "
        "unless `evaluate.race` names others.",
    ]


if __name__ == "__main__":
    main()
