"""Measure the runtime: how much of what a SubNet leaves out becomes time, as ratios.

    python benchmarks/runtime.py [--only mixed released ...] [--device cuda --dtype bfloat16]
        [--batch 8] [--compile] [--size 512] [--steps 20] [--rounds 7] [--write]

What is compared runs in turns in one process, so that load and clocks hit all alike; ratios are of
denoising loops. Models have their full width (FLUX is cut where no GPU is used) and seeded weights.
`--write` keeps the tables in benchmarks/runtime.json and renders benchmarks/runtime.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "runtime"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from full_width import FLUX_ON_CPU, Bench, Size, dit, flux, sd15, sdxl  # noqa: E402
from keep import keep_file  # noqa: E402
from torch import nn  # noqa: E402

from dipgo_core.binding import subnet_of  # noqa: E402
from dipgo_core.evaluation.device import device_name  # noqa: E402
from dipgo_core.evaluation.execution import library_versions  # noqa: E402
from dipgo_core.evaluation.intervals import bootstrap_median  # noqa: E402
from dipgo_core.evaluation.stopwatch import Stopwatch, stopwatch_for, timed_call  # noqa: E402
from dipgo_core.gates import GateTable  # noqa: E402
from dipgo_core.graph import BlockGraph  # noqa: E402
from dipgo_core.hooks import Forward, MethodHook  # noqa: E402
from dipgo_core.pipelines import block_graph  # noqa: E402
from dipgo_core.runtime import apply_subnet  # noqa: E402

Floats = np.ndarray[Any, np.dtype[np.float64]]
Ready = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One ratio with its 95 % interval, and the goal it has."""

    figure: str
    case: str
    calls: int
    rounds: int
    value: float
    low: float
    high: float
    goal: float
    speed_up: float | None = None
    macs_limit: float | None = None

    @property
    def met(self) -> str:
        if self.value >= self.goal:
            return "yes"
        return "within the interval" if self.high >= self.goal else "no"


# running in turns ---------------------------------------------------------------------------------


def loop_times(
    bench: Bench, contestants: Mapping[str, Ready], options: argparse.Namespace
) -> dict[str, Floats]:
    """Return the denoising loop's milliseconds of each contestant in each round.

    Another contestant goes first in every round. Getting ready (applying a SubNet, switching a
    cache on) is not timed; the first round is not counted.
    """
    watch = stopwatch_for(options.device)
    names = list(contestants)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(options.rounds + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            with contestants[name]():
                found = timed_call(bench.call, bench.model.pipe.scheduler, bench.denoiser, watch)
            assert found.loop_ms is not None
            times[name].append(found.loop_ms)
    return {name: np.array(values[1:]) for name, values in times.items()}


def row_of(values: Floats, **facts: Any) -> Row:
    """Return the median of one ratio a round."""
    found = bootstrap_median(values)
    return Row(rounds=len(values), value=found.value, low=found.low, high=found.high, **facts)


def applied(bench: Bench, graph: BlockGraph, gates: GateTable, compiled: bool = False) -> Ready:
    """Return what applies a SubNet to the pipeline for as long as one run lasts."""
    subnet = subnet_of(bench.model, graph, bench.sampler, gates)
    return partial(apply_subnet, bench.model.pipe, subnet)


@dataclass
class BlockClock:
    """Times every block of dense runs; what each took is summed over a run's calls."""

    bench: Bench
    graph: BlockGraph
    watch: Stopwatch
    runs: list[Floats] = field(default_factory=list)  # (N,) milliseconds; 0 is the whole denoiser

    @contextmanager
    def __call__(self) -> Iterator[None]:
        marks: list[list[tuple[Any, Any]]] = [[] for _ in self.graph.names]
        hooks = [
            MethodHook(self.bench.denoiser.get_submodule(name), "forward", self._timing(spans))
            for name, spans in zip(self.graph.names, marks, strict=True)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.watch.wait()
        spent = [sum(self.watch.milliseconds(*span) for span in spans) for spans in marks]
        self.runs.append(np.array(spent))

    def _timing(self, spans: list[tuple[Any, Any]]) -> Any:
        def intercept(original: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            start = self.watch.mark()
            output = original(*args, **kwargs)
            spans.append((start, self.watch.mark()))
            return output

        return intercept

    def kept_shares(self, gates: GateTable, loops: Floats) -> Floats:
        """Return the share of each timed run's loop that `gates` keep.  # (rounds,)

        A call that is not skipped pays what no gate decides: inside the denoiser, and outside it
        the noise scheduler and guidance. A skipped call pays nothing, though its step is made.
        """
        counted = np.array(self.runs[-len(loops) :])
        own = np.column_stack([loops - counted[:, 1:].sum(axis=1), counted[:, 1:]])
        live = self.graph.close(gates).keep.mean(axis=0)
        return np.asarray(own @ live / loops)


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
    bench = build(_size(options), calls)
    graph = block_graph(bench.model)
    clock = BlockClock(bench, graph, stopwatch_for(options.device))
    ready: dict[str, Ready] = {"dense": nullcontext, "timed": clock}
    ready |= {str(target): applied(bench, graph, tables[target]) for target in targets}
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
    """Compare the published gates with what their MACs allow."""
    gates = keep_file("sd15-released-0.8").gates
    bench = sd15(_size(options), gates.num_calls)
    graph = block_graph(bench.model)
    times = loop_times(bench, {"dense": nullcontext, "ours": applied(bench, graph, gates)}, options)
    speed_ups, limit = times["dense"] / times["ours"], _macs_limit(graph, gates)
    yield row_of(
        speed_ups / limit,
        figure="released gates: speed-up ÷ MACs limit",
        case="sd15, r = 0.8",
        calls=gates.num_calls,
        goal=0.98,
        speed_up=float(np.median(speed_ups)),
        macs_limit=limit,
    )


def all_keep(options: argparse.Namespace) -> Iterator[Row]:
    """Compare a SubNet that keeps everything with no SubNet."""
    calls = options.steps or 5
    bench = sd15(_size(options), calls)
    graph = block_graph(bench.model)
    gates = GateTable.all_keep(calls, graph.num_blocks)
    times = loop_times(bench, {"plain": nullcontext, "ours": applied(bench, graph, gates)}, options)
    yield row_of(
        times["plain"] / times["ours"],
        figure="all-keep SubNet: time of the plain pipeline ÷ ours",
        case="sd15",
        calls=calls,
        goal=0.995,
    )


def deepcache(options: argparse.Namespace) -> Iterator[Row]:
    """Compare our gates with the DeepCache package on its own schedules."""
    calls = options.steps or 10
    bench = sd15(_size(options), calls)
    graph = block_graph(bench.model, "layer")
    for interval, branch in ((5, 0), (3, 2)):
        theirs = partial(_deepcache_enabled, bench, interval, branch)
        ours = applied(bench, graph, deepcache_gates(graph, calls, interval, branch))
        _check_same_work(bench, theirs, ours)
        times = loop_times(bench, {"theirs": theirs, "ours": ours}, options)
        yield row_of(
            times["theirs"] / times["ours"],
            figure="DeepCache's schedule: time of its package ÷ ours",
            case=f"sd15, every {interval}th call whole, branch {branch}",
            calls=calls,
            goal=1.0,
        )


def deepcache_gates(graph: BlockGraph, calls: int, interval: int, branch: int) -> GateTable:
    """Return DeepCache's schedule as gates of granularity `layer`.

    Every `interval`-th call is whole; the others compute the layers above the branch alone
    (DeepCache, arXiv 2312.00858; the numbering of branches is its package's).
    """
    shallow = np.array([not name or _above_branch(graph, name, branch) for name in graph.names])
    return GateTable(np.array([shallow | (call % interval == 0) for call in range(calls)]))


def _above_branch(graph: BlockGraph, name: str, branch: int) -> bool:
    side, *rest = name.split(".")
    if side == "mid_block":
        return False
    stage, kind, layer = int(rest[0]), rest[1], int(rest[2])
    siblings = [n for n in graph.names if n.startswith(f"{side}.{stage}.resnets.")]
    if side == "down_blocks":
        return (stage, len(siblings) if kind == "downsamplers" else layer) < divmod(branch, 3)
    stages = {n.split(".")[1] for n in graph.names if n.startswith("up_blocks.")}
    from_end = 0 if kind == "upsamplers" else len(siblings) - 1 - layer
    return (len(stages) - 1 - stage, from_end) <= divmod(branch, 3)


@contextmanager
def _deepcache_enabled(bench: Bench, interval: int, branch: int) -> Iterator[None]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=bench.model.pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def flux_caches(options: argparse.Namespace) -> Iterator[Row]:
    """Compare our gates with diffusers' own caches, which are made to skip the same blocks."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    calls = options.steps or 10
    bench = flux(_size(options), calls, FLUX_ON_CPU if options.device == "cpu" else {})
    graph = block_graph(bench.model)
    heads = np.arange(graph.num_blocks) == 0
    first = heads | (np.arange(graph.num_blocks) == 1)
    every_fourth = np.arange(calls) % 4 == 0
    cases: dict[str, tuple[Any, GateTable]] = {
        "FirstBlockCache, the first block alone after call 0": (
            FirstBlockCacheConfig(threshold=1e9),
            GateTable(first | (np.arange(calls) == 0)[:, None]),
        ),
        "MagCache, every 4th call whole, else no block": (
            MagCacheConfig(
                threshold=1e9,
                max_skip_steps=3,
                retention_ratio=0.0,
                num_inference_steps=calls,
                mag_ratios=[1.0] * calls,
            ),
            GateTable(heads | every_fourth[:, None]),
        ),
    }
    for name, (config, gates) in cases.items():
        theirs, ours = partial(_cache_enabled, bench, config), applied(bench, graph, gates)
        _check_same_work(bench, theirs, ours)
        times = loop_times(bench, {"theirs": theirs, "ours": ours}, options)
        yield row_of(
            times["theirs"] / times["ours"],
            figure="FLUX, diffusers' own caches at equal skipped blocks: their time ÷ ours",
            case=name,
            calls=calls,
            goal=1.0,
        )


@contextmanager
def _cache_enabled(bench: Bench, config: Any) -> Iterator[None]:
    denoiser: Any = bench.denoiser
    denoiser.enable_cache(config)
    try:
        yield
    finally:
        denoiser.disable_cache()


def _check_same_work(bench: Bench, theirs: Ready, ours: Ready) -> None:
    """Raise unless both run the same layers equally often and end at the same latents."""
    found = [_executed(bench, ready) for ready in (theirs, ours)]
    (work, latents), (our_work, our_latents) = found
    if work != our_work:
        raise SystemExit(f"not the same work: {work - our_work} / {our_work - work}")
    spread = float((latents.float() - our_latents.float()).abs().max() / latents.float().std())
    if not spread < 0.05:  # half precision rounds in another order
        raise SystemExit(f"the same work, but latents differ by {spread:.2g} of their deviation")


def _executed(bench: Bench, ready: Ready) -> tuple[Counter[str], torch.Tensor]:
    work: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: work.update([name])

    hooks = [
        module.register_forward_pre_hook(counting(name))
        for name, module in bench.denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with ready():
            return work, bench.call()
    finally:
        for hook in hooks:
            hook.remove()


def _macs_limit(graph: BlockGraph, gates: GateTable) -> float:
    return 1 / (1 - graph.pruned_ratio(gates))


def _size(options: argparse.Namespace) -> Size:
    return Size(side=options.size, batch=options.batch, device=options.device, dtype=options.dtype)


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
#: What is shown even where it was never measured.
GPU_CELLS: Final = tuple(
    f"cuda, bfloat16, batch {batch}, {mode}" for batch in (1, 8) for mode in ("eager", "compiled")
)


def main() -> None:
    """Measure, print each row, keep them if asked to."""
    options = _options()
    torch.set_num_threads(options.threads)
    for name in options.only or FIGURES:
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
    lines = ["# The runtime, measured", "", *(__doc__ or "").strip().splitlines()[-4:-2], ""]
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
        "python": platform.python_version(),
        **library_versions(),
        "DeepCache": version("DeepCache"),
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
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    options.size = options.size or (128 if options.device == "cpu" else 512)
    return options


if __name__ == "__main__":
    main()
