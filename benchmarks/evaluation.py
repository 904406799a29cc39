"""Measure evaluation: equal to torch-fidelity, fast, small in memory, honest in its intervals.

    python benchmarks/evaluation.py [fidelity] [throughput] [memory] [coverage] [--write]

Prints a table for each section named (all of them by default); `--write` keeps them in
benchmarks/evaluation.json and renders benchmarks/evaluation.md from it. `--images N` makes the
memory section smaller, `--metrics psnr` leaves its FID and KID out, `--pairs N` the number of
interleaved runs of the throughput section, `--threads N` what a task computes with.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import date
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
#: The tests' own draws and oracles; some libraries install a package of the same name.
sys.modules["tests"] = ModuleType("tests")
sys.modules["tests"].__path__ = [str(ROOT / "tests")]

import numpy as np  # noqa: E402  # after the path to the tests
import torch  # noqa: E402

from dipgo_core.config import ModelSettings, SamplerSettings  # noqa: E402
from dipgo_core.evaluation.clip_score import load_clip  # noqa: E402
from dipgo_core.evaluation.device import cpu_name  # noqa: E402
from dipgo_core.evaluation.evaluate import evaluate_shards, generate_images  # noqa: E402
from dipgo_core.evaluation.fid import (  # noqa: E402
    fid_figures,
    folder_reference,
    kid_figure,
    load_extractor,
)
from dipgo_core.evaluation.fid_intervals import fid_jackknife  # noqa: E402
from dipgo_core.evaluation.intervals import (  # noqa: E402
    bootstrap_mean,
    bootstrap_median,
    difference_of,
    interval_of,
    mean_replicates_of,
)
from dipgo_core.evaluation.metrics import Role  # noqa: E402
from dipgo_core.evaluation.prompts import in_order, items_sha256, read_items  # noqa: E402
from dipgo_core.evaluation.protocol import Protocol, largest_kid_subset  # noqa: E402
from dipgo_core.evaluation.scorers import Scorer  # noqa: E402
from dipgo_core.pipelines import LoadedModel, load_model  # noqa: E402
from tests.support.fidelity import by_program, save_images, untrained_inception  # noqa: E402
from tests.support.simulated import DIM, SIDE, run_simulated  # noqa: E402
from tests.support.synthetic import DRAWS, SIZES, clustered, groups_of  # noqa: E402

Row = Mapping[str, Any]
STEPS = 10
KID_SUBSET = 24
METRICS = ("fid", "kid", "clip", "psnr", "ssim")


def main() -> None:
    """Measure the sections named, print their tables, keep them if asked to."""
    options = _options()
    torch.set_num_threads(options.threads)
    for name in options.sections or SECTIONS:
        rows = list(SECTIONS[name][1](options))
        found = {"machine": _machine(options), "rows": rows}
        print(_section(name, found), flush=True)
        if options.write:
            _keep(name, found)


def _keep(name: str, found: Mapping[str, Any]) -> None:
    """Write a section beside those measured earlier, and the page of all."""
    results = HERE / "evaluation.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    known[name] = found
    results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    parts = [_section(name, known[name]) for name in SECTIONS if name in known]
    text = "# Evaluation, measured\n\n" + "\n".join(parts)
    (HERE / "evaluation.md").write_text(text, encoding="utf-8")


# the same figures as torch-fidelity -----------------------------------------------------------


def fidelity(options: argparse.Namespace) -> Iterator[Row]:
    """Compare FID and KID of two folders with those of torch-fidelity's own program."""
    ours_drawn, real_drawn = _noise(0, 48), _noise(1, 56) // 2
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        ours = save_images(ours_drawn, root / "ours")
        real = save_images(real_drawn, root / "real")
        weights = untrained_inception(root / "untrained.pth")
        for label, extractor, arguments in (
            ("tiny-features", "tiny-features", ("--feature-extractor", "tiny-features")),
            (
                "Inception, untrained weights",
                f"inception-v3-compat:{weights}",
                ("--feature-extractor-weights-path", str(weights)),
            ),
        ):
            fid, kid = by_program(ours, real, KID_SUBSET, *arguments)
            yield from _compared(label, load_extractor(extractor), ours, real, fid, kid)


def _compared(
    label: str, extractor: Any, ours: Path, real: Path, fid: float, kid: float
) -> Iterator[Row]:
    found, reference = (folder_reference(folder, extractor) for folder in (ours, real))
    assert found.features is not None
    groups = np.arange(found.n)
    figures = {
        "FID": (fid_figures(found.features, reference, groups)["fid"].value, fid),
        "KID": (kid_figure(found.features, reference, groups, subset_size=KID_SUBSET).value, kid),
    }
    for name, (mine, theirs) in figures.items():
        yield {
            "extractor": label,
            "metric": name,
            "images": f"{found.n} and {reference.n}",
            "this project": f"{mine:.9g}",
            "torch-fidelity's program": f"{theirs:.9g}",
            "relative difference": _relative(mine, theirs),
        }


def _relative(mine: float, theirs: float) -> str:
    return "both are 0" if mine == theirs == 0 else f"{abs(mine - theirs) / abs(theirs):.1e}"


def _noise(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=generator, dtype=torch.uint8)


# throughput against a loop that scores nothing -------------------------------------------------


def throughput(options: argparse.Namespace) -> Iterator[Row]:
    """Interleave a plain pipeline loop with generation that is scored; compare their times."""
    model = load_model(ModelSettings(id="tiny-sd"))
    scorers: dict[Role, Any] = {
        "features": load_extractor("tiny-features"),
        "clip": load_clip("tiny-clip"),
    }
    items = in_order(read_items("bundled:test"))
    count = options.batches * options.batch_size
    known: dict[Role, Scorer] = {
        "features": scorers["features"].scorer,
        "clip": scorers["clip"].scorer,
    }
    protocol = Protocol(
        split="test",
        items_sha256=items_sha256(items),
        num_items=len(items),
        images=count,
        seed=0,
        height=32,
        width=32,
        sampler=SamplerSettings(scheduler="ddim", steps=STEPS, guidance_scale=3.0).to_json(),
        dtype="float32",
        scorers=known,
        metrics=METRICS,
        kid_subset_size=largest_kid_subset(count),
    )
    plain, scored = _both_ways(model, protocol, items, scorers, options.batch_size)
    plain(), scored()  # warm
    times = [(_timed(plain), _timed(scored)) for _ in range(options.pairs)]
    for index, clock in enumerate(("wall clock", "CPU time")):
        ratios = np.array([one[index] / other[index] for one, other in times])
        found = bootstrap_median(ratios)
        yield {
            "clock": clock,
            "batch": options.batch_size,
            "images a run": count,
            "pairs": options.pairs,
            "plain, images/s": f"{count / np.median([one[index] for one, _ in times]):.2f}",
            "scored, images/s": f"{count / np.median([two[index] for _, two in times]):.2f}",
            "ratio": f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]",
        }


def _both_ways(
    model: LoadedModel, protocol: Protocol, items: Any, scorers: Any, batch_size: int
) -> tuple[Callable[[], object], Callable[[], object]]:
    sampler = SamplerSettings(**protocol.sampler)
    settings: dict[str, Any] = {"sampler": sampler, "batch_size": batch_size}

    def images() -> Iterator[torch.Tensor]:
        wanted = range(protocol.images)
        return (b.images for b in generate_images(model, protocol, items, wanted, **settings))

    dense = torch.cat(list(images())).flip(0)

    def plain() -> None:
        for _ in images():
            pass

    def scored() -> None:
        shards = evaluate_shards(
            model,
            protocol,
            items,
            scorers,
            dense=lambda start, stop: dense[start:stop],
            **settings,
        )
        for _ in shards:
            pass

    return plain, scored


def _timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


# memory ------------------------------------------------------------------------------------------


def memory(options: argparse.Namespace) -> Iterator[Row]:
    """Evaluate many large images with a simulated generator; tell the peak of each run."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        began = time.monotonic()
        run = run_simulated(Path(folder), options.images, options.metrics)
        with closing(run):
            for task, record in run:
                if task.kind == "images":  # its figures come with what it feeds
                    continue
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
                yield {
                    "task": task.kind,
                    "images": f"{options.images:,} at {SIDE} x {SIDE}",
                    "measured": ", ".join(record.outputs.get("metrics", ())) or "",
                    "features": "" if task.kind == "reference" else f"{DIM} a image",
                    "peak so far, GiB": f"{peak:.2f}",
                    "seconds so far": f"{time.monotonic() - began:.0f}",
                }


# coverage ----------------------------------------------------------------------------------------


def coverage(options: argparse.Namespace) -> Iterator[Row]:
    """Count how many of 200 draws a 95 % interval covers the truth in, prompts of many images."""
    from tests.dipgo_core.evaluation.test_mmd_intervals import covered as kid_covered

    for kind in ("alone", "equal", "unequal"):
        yield _covered("mean score (CLIP, PSNR, ...)", kind, _mean_covers)
        yield _covered("paired difference of means", kind, _difference_covers)
    for paired in (False, True):
        reference = "dense images, paired" if paired else "fixed images"
        for kind in ("alone", "unequal"):
            hits = kid_covered(kind, 0.5, paired=paired)
            yield _coverage_row(f"KID, {reference}", kind, hits)
    for per, images in ((1, 256), (4, 512)):
        hits = sum(_fid_covers(draw, per, images) for draw in range(DRAWS))
        yield _coverage_row("FID, 32-block jackknife", f"{images // per} of {per}", hits)


def _covered(name: str, kind: str, covers: Callable[[np.random.Generator, Any, Any], bool]) -> Row:
    sizes = SIZES[kind]
    hits = sum(
        covers(np.random.default_rng(draw), sizes, groups_of(sizes)) for draw in range(DRAWS)
    )
    return _coverage_row(name, kind, hits)


def _coverage_row(name: str, prompts: str, hits: int) -> Row:
    return {
        "interval": name,
        "prompts": prompts,
        "draws": DRAWS,
        "covered": f"{hits} ({hits / DRAWS:.1%})",
    }


def _mean_covers(rng: np.random.Generator, sizes: Any, groups: Any) -> bool:
    found = bootstrap_mean(np.exp(0.5 * clustered(rng, sizes)[:, 0]), groups)
    return found is not None and found.low <= np.exp(0.125) <= found.high


def _difference_covers(rng: np.random.Generator, sizes: Any, groups: Any) -> bool:
    a = clustered(rng, sizes)[:, 0]
    b = a + 0.1 + 0.1 * clustered(rng, sizes)[:, 0]
    first, second = (mean_replicates_of(side, groups) for side in (b, a))
    assert first is not None and second is not None
    found = interval_of(difference_of(first, second))
    return found.low <= 0.1 <= found.high


def _fid_covers(draw: int, per: int, images: int) -> bool:
    dim, sizes = 16, np.full(images // per, per)
    x = clustered(np.random.default_rng(draw), sizes, dim) + 0.2
    found = fid_jackknife(x, (np.zeros(dim), np.eye(dim)), groups_of(sizes))
    return found is not None and found.low <= dim * 0.2**2 <= found.high


# tables ------------------------------------------------------------------------------------------

SECTIONS: Final[Mapping[str, tuple[str, Callable[[argparse.Namespace], Iterator[Row]]]]] = {
    "fidelity": (
        "FID and KID against torch-fidelity's own program on the same folders of PNGs "
        "(goal: 1e-6 relative)",
        fidelity,
    ),
    "throughput": (
        "Generation and scoring (fid, kid, clip, psnr, ssim) against a loop of the same pipeline "
        "calls that scores nothing, interleaved in one run (tiny-sd, 10 steps; goal: 0.97)",
        throughput,
    ),
    "memory": (
        "Peak host memory of a worker that does these tasks one after the other; the generator is "
        "simulated, everything else is not (goal: under 2 GB)",
        memory,
    ),
    "coverage": ("Coverage of 95 % intervals over synthetic draws (goal: 90 to 99 %)", coverage),
}


def _section(name: str, found: Mapping[str, Any]) -> str:
    rows: Sequence[Row] = found["rows"]
    names = list(rows[0])
    lines = [f"## {SECTIONS[name][0]}", "", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(str(row[key]) for key in names)} |" for row in rows]
    return "\n".join([*lines, "", found["machine"], ""])


def _machine(options: argparse.Namespace) -> str:
    versions = ", ".join(f"{n} {version(n)}" for n in ("torch", "diffusers", "torch-fidelity"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    return (
        f"{date.today()}, commit {commit or 'unknown'}; {cpu_name()}, {os.cpu_count()} cores, "
        f"{options.threads} compute threads, load averages at the end {load}; Python "
        f"{platform.python_version()}, {versions}."
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--metrics", nargs="*", default=["fid", "kid", "psnr"])
    parser.add_argument("--folder", default=None, help="where the images are kept meanwhile")
    return parser.parse_args()


if __name__ == "__main__":
    main()
