"""Whether the latency measurement can be believed; writes latency/README.md.

    python benchmarks/latency.py [repeats, default 40]

A/A: the dense pipeline against itself; 95 % of the intervals of the ratio should contain 1. Then
the dense pipeline against an all-keep SubNet, which computes the same through the hooks: what
remains of 1 is what hooks cost. Then how much of a call lies outside the denoising loop, which no
pruning of the denoiser makes faster.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import torch

from dipgo_core.binding import subnet_of
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.evaluation.device import cpu_name
from dipgo_core.evaluation.execution import library_versions
from dipgo_core.evaluation.latency import Latency, measure_latency
from dipgo_core.evaluation.load import CpuWatch, Watched, undisturbed
from dipgo_core.evaluation.stopwatch import Timed, WallStopwatch, timed_call
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph, load_model
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import call_arguments, set_sampler
from dipgo_core.subnet import SubNet

FOLDER: Final = Path(__file__).resolve().parent / "latency"
SAMPLER: Final = SamplerSettings(scheduler="ddim", steps=10, guidance_scale=3.0)
ITEM: Final = Item("a red boot", 7)
PAIRS: Final = 10
SIZES: Final = (1, 8)


def main() -> None:
    """Measure, write the raw numbers and the page."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    torch.set_num_threads(1)
    model = load_model(ModelSettings(id="tiny-sd"))
    whole = all_keep(model)
    agreement = {
        "dense against dense": [against(model, None) for _ in range(repeats)],
        "all-keep SubNet against dense": [against(model, whole) for _ in range(repeats)],
    }
    spans = [row for name in ("tiny-sd", "tiny-dit") for row in spans_of(name)]
    found = {
        "machine": machine(),
        "agreement": agreement,
        "spans": [asdict(row) for row in spans],
    }
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "README.md").write_text(page(found), encoding="utf-8")


def all_keep(model: LoadedModel) -> SubNet:
    graph = block_graph(model)
    gates = GateTable.all_keep(len(set_sampler(model, SAMPLER)), graph.num_blocks)
    return subnet_of(model, graph, SAMPLER, gates)


def against(model: LoadedModel, subnet: SubNet | None) -> dict[str, Any]:
    """Measure the dense run against a run that should take as long."""
    watched = measured(model, subnet, size=1)
    return {**asdict(watched.value.speedup), "disturbed": watched.finding.disturbed}


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A pipeline call; what a user does once is done before it is timed."""

    model: LoadedModel
    subnet: SubNet | None
    size: int

    def __call__(self) -> Timed:
        """Set up, call and time, end to end and in the loop."""
        pipe = self.model.pipe
        set_sampler(self.model, SAMPLER)
        arguments = call_arguments(self.model, [ITEM] * self.size, range(self.size), SAMPLER)
        applied = nullcontext() if self.subnet is None else apply_subnet(pipe, self.subnet)
        with applied:
            return timed_call(
                lambda: pipe(**arguments), pipe.scheduler, self.model.denoiser, WallStopwatch()
            )


def measured(model: LoadedModel, subnet: SubNet | None, *, size: int) -> Watched[Latency]:
    def measure() -> Latency:
        return measure_latency(
            PreparedRun(model, None, size),
            PreparedRun(model, subnet, size),
            batch_size=size,
            min_runs=PAIRS,
            min_seconds=0,
            timer=lambda run: cast(Timed, run()),
        )

    return undisturbed(measure, [CpuWatch(threads=1)])


@dataclass(frozen=True)
class Span:
    """How long one dense call takes, and the denoising loop in it."""

    model: str
    batch_size: int
    total_ms: float
    loop_ms: float
    disturbed: str | None


def spans_of(name: str) -> Iterator[Span]:
    model = load_model(ModelSettings(id=name))
    for size in SIZES:
        watched = measured(model, None, size=size)
        found = watched.value
        assert found.dense_loop_ms is not None
        total, loop = found.dense_latency_ms.value, found.dense_loop_ms.value
        yield Span(name, size, total, loop, watched.finding.disturbed)


def machine() -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        **library_versions(),
    }


def page(found: Mapping[str, Any]) -> str:
    """Return the tables as Markdown."""
    where = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return "\n".join(
        [
            "# Can the latency measurement be believed?",
            "",
            f"tiny-sd, DDIM, {SAMPLER.steps} calls, {PAIRS} pairs a measurement, after warm-up. "
            f"Measured by `python benchmarks/latency.py` on: {where}.",
            "",
            "| measurement | repeats | disturbed | intervals of the ratio that contain 1 | "
            "median ratio | median width |",
            "|---|---|---|---|---|---|",
            *(_agreement_row(name, rows) for name, rows in found["agreement"].items()),
            "",
            "Disturbed repeats are left out of the last three columns. Two equal runs should give "
            "intervals that contain 1 in about 95 % of the repeats.",
            "",
            "| model | images a run | end to end, ms | denoising loop, ms | outside the loop | "
            "most that skipping 70 % of the loop can give |",
            "|---|---|---|---|---|---|",
            *(_span_row(row) for row in found["spans"]),
            "",
        ]
    )


def _agreement_row(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    quiet = [row for row in rows if row["disturbed"] is None]
    if not quiet:
        return f"| {name} | {len(rows)} | {len(rows)} | | | |"
    covered = sum(row["low"] <= 1 <= row["high"] for row in quiet)
    ratio = np.median([row["value"] for row in quiet])
    width = np.median([row["high"] - row["low"] for row in quiet])
    return (
        f"| {name} | {len(rows)} | {len(rows) - len(quiet)} | {covered} of {len(quiet)} | "
        f"{ratio:.3f} | {width:.3f} |"
    )


def _span_row(row: Mapping[str, Any]) -> str:
    total, loop = row["total_ms"], row["loop_ms"]
    best = total / (total - 0.7 * loop)
    noisy = " (disturbed)" if row["disturbed"] else ""
    return (
        f"| {row['model']}{noisy} | {row['batch_size']} | {total:.1f} | {loop:.1f} | "
        f"{1 - loop / total:.0%} | {best:.2f} × |"
    )


if __name__ == "__main__":
    main()
