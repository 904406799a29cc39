"""Measure the runtime: how much of what a SubNet leaves out becomes time, as ratios.

    python benchmarks/runtime.py [--only mixed released ...] [--device cuda --dtype bfloat16]
        [--batch 8] [--compile] [--size 512] [--steps 20] [--rounds 7] [--threads 2] [--write]

What is compared runs in turns in one process, so that load and clocks hit all alike; ratios are of
denoising loops. Models have their full width (FLUX is cut where no GPU is used) and seeded weights.
`--clock cpu` (with `--threads 1`) takes CPU times, where other work shares the machine.
`--write` keeps the tables in benchmarks/runtime.json and renders benchmarks/runtime.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "runtime"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from full_width import Bench, dit, sd15, sdxl  # noqa: E402
from keep import keep_file  # noqa: E402
from rivals import deepcache, flux_caches, has_deepcache  # noqa: E402
from turns import BlockClock, Ready, Row, applied, loop_times, plain, row_of, size_of, watch_of  # noqa: E402

from dipgo_core.evaluation.device import device_name  # noqa: E402
from dipgo_core.evaluation.execution import library_versions  # noqa: E402
from dipgo_core.gates import GateTable  # noqa: E402
from dipgo_core.graph import BlockGraph  # noqa: E402
from dipgo_core.pipelines import block_graph  # noqa: E402

# figures ------------------------------------------------------------------------------------------


def mixed(options: argparse.Namespace) -> Iterator[Row]:
    """Compare mixed rows with the time of what they keep."""
    yield from _against_kept("sd15", sd15, (0.3, 0.5, 0.7), options)


def other_models(options: argparse.Namespace) -> Iterator[Row]:
    """The same of a transformer with residual reuse."""
    yield from _against_kept("dit", dit, (0.5,), options)


def largest_model(options: argparse.Namespace) -> Iterator[Row]:
    """The same of the largest U-Net."""
    yield from _against_kept("sdxl", sdxl, (0.5,), options)


def _against_kept(
    name: str, build: Callable[..., Bench], targets: Sequence[float], options: argparse.Namespace
) -> Iterator[Row]:
    tables = {target: keep_file(f"{name}-mixed-{target}").gates for target in targets}
    calls = tables[targets[0]].num_calls
    bench = build(size_of(options), calls)
    graph = block_graph(bench.model)
    whole: Ready = nullcontext
    if options.compile:
        whole = applied(bench, graph, GateTable.all_keep(calls, graph.num_blocks), options)
    clock = BlockClock(bench, graph, watch_of(options), whole)
    ready: dict[str, Ready] = {"dense": plain(bench, options), "timed": clock}
    ready |= {
        str(target): applied(bench, graph, gates, options) for target, gates in tables.items()
    }
    times = loop_times(bench, ready, options)
    for target, gates in tables.items():
        speed_ups = times["dense"] / times[str(target)]
        yield row_of(
            speed_ups * clock.kept_shares(gates, times["timed"]),
            figure="mixed rows: speed-up ÷ (dense time ÷ time of what is kept)",
            case=f"{name}, r = {target}",
            calls=calls,
            goal=0.97,
            speed_up=float(np.median(speed_ups)),
            macs_limit=_macs_limit(graph, gates),
        )


def released(options: argparse.Namespace) -> Iterator[Row]:
    """Compare the published gates with what their MACs allow, step by step and with jumps."""
    gates = keep_file("sd15-released-0.8").gates
    bench = sd15(size_of(options), gates.num_calls)
    graph = block_graph(bench.model)
    ours = applied(bench, graph, gates, options)
    cases: dict[str, Ready] = {"every step": ours, "jumps": lambda: ours().fuse()}
    times = loop_times(bench, {"dense": plain(bench, options), **cases}, options)
    limit = _macs_limit(graph, gates)
    for case in cases:
        speed_ups = times["dense"] / times[case]
        yield row_of(
            speed_ups / limit,
            figure="released gates: speed-up ÷ MACs limit",
            case=f"sd15, r = 0.8, {case}",
            calls=gates.num_calls,
            goal=0.98,
            speed_up=float(np.median(speed_ups)),
            macs_limit=limit,
        )


def all_keep(options: argparse.Namespace) -> Iterator[Row]:
    """Compare a SubNet that keeps everything with no SubNet."""
    calls = options.steps or 5
    bench = sd15(size_of(options), calls)
    graph = block_graph(bench.model)
    gates = GateTable.all_keep(calls, graph.num_blocks)
    ours = applied(bench, graph, gates, options)
    times = loop_times(bench, {"plain": plain(bench, options), "ours": ours}, options)
    yield row_of(
        times["plain"] / times["ours"],
        figure="all-keep SubNet: time of the plain pipeline ÷ ours",
        case="sd15",
        calls=calls,
        goal=0.995,
    )


def _macs_limit(graph: BlockGraph, gates: GateTable) -> float:
    return 1 / (1 - graph.pruned_ratio(gates))


# tables -------------------------------------------------------------------------------------------

FIGURES: Final[Mapping[str, Callable[[argparse.Namespace], Iterator[Row]]]] = {
    "mixed": mixed,
    "released": released,
    "deepcache": deepcache,
    "flux": flux_caches,
    "all-keep": all_keep,
    "dit": other_models,
    "sdxl": largest_model,
}
#: Other people's caches are compared eagerly alone: they are not made for compiled pipelines.
EAGER_ONLY: Final = ("deepcache", "flux")
#: What is shown even where it was never measured.
GPU_CELLS: Final = tuple(
    f"cuda, bfloat16, batch {batch}, {mode}" for batch in (1, 8) for mode in ("eager", "compiled")
)


def main() -> None:
    """Measure, print each row, keep them if asked to."""
    options = _options()
    torch.set_num_threads(options.threads)
    measured = [name for name in FIGURES if not (options.compile and name in EAGER_ONLY)]
    if not options.only and "deepcache" in measured and not has_deepcache():
        print("deepcache: not run, it needs the extra `bench` (pip install -e '.[bench]')")
        measured.remove("deepcache")
    for name in options.only or measured:
        rows = list(FIGURES[name](options))
        for row in rows:
            print(_line(row), flush=True)
        if options.write:
            _keep(name, rows, options)


def _keep(name: str, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Write a figure beside those measured earlier, and the page of all."""
    results = HERE / "runtime.json"
    known = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    mode = "compiled" if options.compile else "eager"
    cell = f"{options.device}, {options.dtype}, batch {options.batch}, {mode}"
    found = {"machine": _machine(options), "rows": [asdict(row) for row in rows]}
    known.setdefault(cell, {})[name] = found
    results.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    (HERE / "runtime.md").write_text(page(known), encoding="utf-8")


def page(known: Mapping[str, Any]) -> str:
    """Return the tables as Markdown, one for each device, precision, batch and mode."""
    lines = [
        "# The runtime, measured",
        "",
        *(__doc__ or "").strip().splitlines()[-4:-2],
        "",
        _NOTE,
        "",
    ]
    for cell in [*known, *(cell for cell in GPU_CELLS if cell not in known)]:
        lines += [f"## {cell}", ""]
        if cell not in known:
            lines += ["not run", ""]
            continue
        lines += [_HEAD, "|---" * (_HEAD.count("|") - 1) + "|"]
        figures = {name: known[cell][name] for name in FIGURES if name in known[cell]}
        lines += [_line(Row(**row)) for found in figures.values() for row in found["rows"]]
        machines: dict[str, list[str]] = {}
        for name, found in figures.items():
            machines.setdefault(_in_words(found["machine"]), []).append(name)
        lines += ["", *(f"{', '.join(names)}: {text}\n" for text, names in machines.items())]
    return "\n".join(lines).rstrip() + "\n"


_NOTE: Final = (
    "A SubNet can be faster than its MACs allow where MACs do not decide: at few pixels and batch "
    "1 the deep blocks, which have most of the weights, take more time than their share of MACs."
)
_HEAD: Final = (
    "| figure | case | calls | rounds | ratio [95 %] | goal | met | speed-up | MACs limit | "
    "speed-up ÷ MACs limit |"
)


def _line(row: Row) -> str:
    gain = "" if row.speed_up is None else f"{row.speed_up:.2f}"
    limit = "" if row.macs_limit is None else f"{row.macs_limit:.2f}"
    share = ""
    if row.speed_up is not None and row.macs_limit is not None:
        share = f"{row.speed_up / row.macs_limit:.3f}"
    ratio = f"{row.value:.3f} [{row.low:.3f}, {row.high:.3f}]"
    cells = (row.figure, row.case, row.calls, row.rounds, ratio, row.goal, row.met)
    return f"| {' | '.join(map(str, cells))} | {gain} | {limit} | {share} |"


def _machine(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": device_name(options.device),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "pixels": options.size,
        "clock": "CPU time of the process" if options.clock == "cpu" else "wall",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **library_versions(),
        **({"DeepCache": version("DeepCache")} if has_deepcache() else {}),
        "date": date.today().isoformat(),
    }


def _in_words(machine: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=[])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--size", type=int, help="pixels: 512 on a GPU, 128 elsewhere")
    parser.add_argument("--steps", type=int, help="calls, where no keep matrix says them")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.size = options.size or (128 if options.device == "cpu" else 512)
    return options


if __name__ == "__main__":
    main()
