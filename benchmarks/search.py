"""Run sweeps/search_benchmark.yaml; leave its tables in benchmarks/search.

python benchmarks/search.py [--tables] [folder for storage and tracking, default benchmarks/.search]

Takes hours, may be stopped and started again; --tables writes what is known by now. A cell is a
model, its sampler and a target; its gain is the mean over search seeds, its interval reaches from
the lowest to the highest end of the 95 % intervals of the seeds, each paired by prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from dipgo_core.evaluation.device import cpu_name
from orchestrator.metrics import figure_text
from orchestrator.sweep_file import load_sweep

HERE = Path(__file__).resolve().parent
SWEEP = HERE.parent / "sweeps" / "search_benchmark.yaml"
TABLES = HERE / "search"
POINTS = TABLES / "points.json"
PROGRAM = Path(sys.executable).with_name("dipgo-sweep")
METRICS = ("psnr", "ssim", "kid", "clip", "fid")
#: What shows quality without the dense run's images.
FREE = ("kid", "clip")
#: By how much a SubNet may at most be worse: dB, and shares of the dense model's figure.
ALLOWED_DB = 0.2
ALLOWED_SHARES = {"clip": 0.005, "kid": 0.05, "fid": 0.05}
DEFAULT = "auto"
#: In the names of models that are searched by what `auto` is compared with, at more effort.
RIVALS = "-rivals"

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Gained:
    """A gain over several search seeds: their mean, and the envelope of their intervals."""

    value: float
    low: float | None
    high: float | None
    seeds: int

    @property
    def beats(self) -> bool:
        return self.low is not None and self.low > 0

    def text(self, metric: str) -> str:
        found = figure_text(metric, self.value, self.low, self.high, signed=True)
        return f"**{found}**" if self.beats else found


@dataclass(frozen=True)
class Cell:
    """One model, sampler and target: its points by strategy, and its baselines."""

    model: str
    target: float
    searched: Mapping[str, Sequence[Point]]
    baselines: Sequence[Point]
    dense: Point | None

    @property
    def name(self) -> str:
        return f"{self.model} | {self.target:g}"

    def done(self, strategy: str) -> list[Point]:
        """Return the evaluated points of a strategy, one a seed."""
        return [point for point in self.searched.get(strategy, ()) if point["figures"]]

    def gained(self, metric: str, strategy: str = DEFAULT) -> Gained | None:
        """Return the gain over the best trivial baseline."""
        return _gained([p["gain"].get(metric) for p in self.done(strategy)])

    def over(self, method: str, metric: str) -> Gained | None:
        """Return the gain over the baseline of a method that is the hardest to beat."""
        keys = [b["key"] for b in self.baselines if b["method"] == method]
        found = [
            _gained([p["gain_over"].get(key, {}).get(metric) for p in self.done(DEFAULT)])
            for key in keys
        ]
        return min(filter(None, found), key=lambda gain: gain.value, default=None)


def _gained(gains: Iterable[Mapping[str, Any] | None]) -> Gained | None:
    known = [gain for gain in gains if gain]
    if not known:
        return None
    lows, highs = ([g[end] for g in known] for end in ("low", "high"))
    bounded = None not in lows + highs
    return Gained(
        mean(gain["value"] for gain in known),
        min(lows) if bounded else None,
        max(highs) if bounded else None,
        len(known),
    )


def cells_of(points: Sequence[Point]) -> list[Cell]:
    """Return all cells of the sweep, those included of which nothing is known."""
    points = [{**point, "model": point["model"].replace(RIVALS, "")} for point in points]
    keys = sorted(
        {(p["model"], p["target"]) for p in points if p["method"] == "search"},
        key=lambda key: (key[0].rsplit("-", 1)[0], key),
    )
    cells = []
    for model, target in keys:
        here = [p for p in points if p["model"] == model and p["target"] == target]
        searched: dict[str, list[Point]] = {}
        for point in here:
            if point["method"] == "search":
                searched.setdefault(point["strategy"], []).append(point)
        dense = next((p for p in points if p["model"] == model and p["method"] == "dense"), None)
        others = [p for p in here if p["method"] not in ("search", "random")]
        baselines: dict[tuple[str, str | None], Point] = {}
        for point in others:  # those of rivals are the same runs
            baselines.setdefault((point["method"], point["variant"]), point)
        cells.append(Cell(model, target, searched, tuple(baselines.values()), dense))
    return cells


def quality_table(cells: Sequence[Cell]) -> list[str]:
    """Gain of the default strategy over the best trivial baseline, by metric."""
    head = "| model | target | seeds | " + " | ".join(m.upper() for m in METRICS)
    lines = [head + " | best baseline by PSNR |", "|---" * (len(METRICS) + 4) + "|"]
    for cell in cells:
        done = cell.done(DEFAULT)
        gains = [cell.gained(metric) for metric in METRICS]
        texts = [g.text(m) if g else "–" for g, m in zip(gains, METRICS, strict=True)]
        bar = {p["gain"]["psnr"]["baseline_key"] for p in done if "psnr" in p["gain"]}
        names = sorted(b["name"] for b in cell.baselines if b["key"] in bar)
        count = f"{len(done)} of {len(cell.searched.get(DEFAULT, ()))}"
        lines.append(f"| {cell.name} | {count} | {' | '.join(texts)} | {', '.join(names) or '–'} |")
    return lines


def baselines_table(cells: Sequence[Cell]) -> list[str]:
    """PSNR gain of the default strategy over the baselines of each kind."""
    methods = sorted({b["method"] for cell in cells for b in cell.baselines})
    lines = ["| model | target | " + " | ".join(methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for cell in cells:
        gains = [cell.over(method, "psnr") for method in methods]
        texts = [gain.text("psnr") if gain else "–" for gain in gains]
        lines.append(f"| {cell.name} | {' | '.join(texts)} |")
    return lines


def strategies_table(cells: Sequence[Cell]) -> list[str]:
    """PSNR gain of each strategy over the best trivial baseline: all at the same search cost."""
    found = sorted({name for cell in cells for name in cell.searched})
    lines = ["| model | target | " + " | ".join(found) + " |", "|---" * (len(found) + 2) + "|"]
    for cell in cells:
        gains = [cell.gained("psnr", strategy) for strategy in found]
        texts = [gain.text("psnr") if gain else "–" for gain in gains]
        lines.append(f"| {cell.name} | {' | '.join(texts)} |")
    return lines


def cost_table(cells: Sequence[Cell]) -> list[str]:
    """What the default strategy has cost, and what its SubNets look like; means over seeds."""
    lines = [
        "| model | target | forwards of one image | seconds | with errors and step masks, forwards "
        "| peak memory, MB | all-or-nothing calls | extrapolation |",
        "|---" * 8 + "|",
    ]
    for cell in cells:
        done = [p for p in cell.done(DEFAULT) if p["search_cost"]]
        if not done:
            lines.append(f"| {cell.name} |" + " – |" * 6)
            continue
        costs = [p["search_cost"] for p in done]
        whole = [c["sample_forwards"] + _begun(c) for c in costs]
        own, seconds = (mean(c[name] for c in costs) for name in ("sample_forwards", "seconds"))
        peaks = [c["peak_memory_bytes"] for c in costs if c.get("peak_memory_bytes")]
        peak = f"{mean(peaks) / 2**20:,.0f}" if peaks else "–"
        share = mean(p["all_or_nothing_share"] for p in done)
        bent = ", ".join(f"{p['extrapolation']:g}" for p in done)
        lines.append(
            f"| {cell.name} | {own:,.0f} | {seconds:,.0f} | {mean(whole):,.0f} | {peak} | "
            f"{share:.0%} | {bent} |"
        )
    return lines


def _begun(cost: Mapping[str, Any]) -> float:
    return sum(one["sample_forwards"] or 0.0 for one in cost["begun_with"].values())


def worse_cells(cells: Sequence[Cell]) -> list[str]:
    """Return where the default strategy may be worse than allowed, each with its bound."""
    found = []
    for cell in cells:
        for metric in ("psnr", *ALLOWED_SHARES):
            gain = cell.gained(metric)
            allowed = _allowed(cell, metric)
            if gain and gain.low is not None and allowed is not None and -gain.low > allowed:
                found.append(f"{cell.model} at {cell.target:g}: {metric} {gain.text(metric)}")
    return found


def _allowed(cell: Cell, metric: str) -> float | None:
    if metric == "psnr":
        return ALLOWED_DB
    figure = (cell.dense or {}).get("figures", {}).get(metric)
    return None if figure is None else abs(figure["value"]) * ALLOWED_SHARES[metric]


def goals(cells: Sequence[Cell]) -> list[str]:
    """Return what the tables say of the goals, counted."""
    known = [cell for cell in cells if cell.gained("psnr")]
    if not known:
        return ["Nothing has been run yet."]
    better = [cell for cell in known if (gain := cell.gained("psnr")) and gain.beats]
    both = [c for c in better if any((g := c.gained(metric)) and g.beats for metric in FREE)]
    missing = [f"{c.model} at {c.target:g}" for c in cells if c not in known]
    mixed = [
        f"{cell.model} at {cell.target:g} seed {p['seed']} ({p['all_or_nothing_share']:.0%})"
        for cell in known
        for p in cell.done(DEFAULT)
        if p["all_or_nothing_share"] < 0.5 and ((p["gain"].get("psnr") or {}).get("low") or 0) > 0
    ]
    worse = worse_cells(known)
    return [
        f"- Cells run: {len(known)} of {len(cells)}. Not run: {', '.join(missing) or 'none'}.",
        f"- `{DEFAULT}` surely beats the best trivial baseline in PSNR to the dense images in "
        f"{len(better)} of {len(known)} cells, and in KID or CLIP as well in {len(both)}.",
        f"- May be worse than allowed ({ALLOWED_DB} dB; 5 % of the dense FID or KID, 0.5 % of "
        f"its CLIP): {'; '.join(worse) or 'nowhere'}.",
        "- SubNets with under half all-or-nothing calls that surely beat the best trivial "
        f"baseline in PSNR: {', '.join(mixed) or 'none'}.",
    ]


def document(cells: Sequence[Cell], machine: Mapping[str, Any]) -> str:
    """Return benchmarks/search/README.md."""
    told = ", ".join(f"{name} {value}" for name, value in machine.items())
    parts = [
        "# Does a search beat the cheap alternatives at equal compute?",
        "Written by [search.py](../search.py) from "
        "[sweeps/search_benchmark.yaml](../../sweeps/search_benchmark.yaml). "
        "1,000 test images a point. A gain is the mean over search seeds, its interval the "
        "envelope of the seeds' 95 % intervals, paired by prompt; positive = better, bold = all "
        "of it above 0. The best trivial baseline is chosen for each metric on calibration "
        f"prompts. Machine: {told}.",
        "\n".join(goals(cells)),
        "## Gain over the best trivial baseline",
        "\n".join(quality_table(cells)),
        "## Over each baseline, PSNR in dB",
        "Of several settings of a baseline the one that is hardest to beat on the test images.",
        "\n".join(baselines_table(cells)),
        "## Strategies, PSNR in dB over the best trivial baseline",
        "`anneal`, `genetic` and `random_search` may spend 250 dense runs of one image on a "
        "target, more than `auto` does with all that it begins with; `calibrate` runs no "
        "candidates.",
        "\n".join(strategies_table(cells)),
        "## Cost of `auto`",
        "\n".join(cost_table(cells)),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Run what is not done, then write the tables; a finished run is not computed again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("place", nargs="?", type=Path, default=HERE / ".search")
    parser.add_argument("--tables", action="store_true", help="write what is known by now")
    asked = parser.parse_args()
    place = asked.place.resolve()
    place.mkdir(parents=True, exist_ok=True)
    if asked.tables:
        tell(place)
        return
    for path in open_sweeps(tell(place), place):
        subprocess.run([PROGRAM, "run", str(path)], cwd=place, check=True)
        tell(place)


def open_sweeps(points: Sequence[Point], place: Path) -> Iterator[Path]:
    """Write a sweep file for each sampler of a model that has points to do; yield in their order.

    What one of them has done is in the storage that all share, under the same keys.
    """
    waiting = {point["model"] for point in points if not point["figures"]}
    whole = yaml.safe_load(SWEEP.read_text(encoding="utf-8"))
    for model in whole["models"]:
        several = isinstance(model["sampler"], list)
        for sampler in [[one] for one in model["sampler"]] if several else [model["sampler"]]:
            one = {**whole, "models": [{**model, "sampler": sampler}]}
            name = one_model(one, place)
            if name in waiting:
                path = place / f"{name}.yaml"
                one["name"] = f"search-benchmark-{name}"
                path.write_text(yaml.safe_dump(one, sort_keys=False), encoding="utf-8")
                yield path


def one_model(sweep: Mapping[str, Any], place: Path) -> str:
    """Return the name that the only model of a sweep goes by in points."""
    path = place / "one.yaml"
    path.write_text(yaml.safe_dump(sweep, sort_keys=False), encoding="utf-8")
    return load_sweep(path).models[0].name


def tell(place: Path) -> list[Point]:
    """Write the tables of all that is known, here or from an earlier run; return all points."""
    printed = subprocess.run(
        [PROGRAM, "pareto", str(SWEEP), "--json"], cwd=place, check=True, capture_output=True
    )
    machine = {
        "CPU": f"{cpu_name()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
        **{name: version(name) for name in ("torch", "diffusers", "optuna")},
    }
    points = with_earlier(json.loads(printed.stdout)["points"], POINTS)
    TABLES.mkdir(exist_ok=True)
    kept = [point for point in points if point["figures"]]
    POINTS.write_text("[\n" + ",\n".join(map(_short, kept)) + "\n]\n", encoding="utf-8")
    (TABLES / "README.md").write_text(document(cells_of(points), machine), encoding="utf-8")
    return points


def with_earlier(points: Sequence[Point], path: Path) -> list[Point]:
    """Return the points, those that are not done as an earlier run has left them, if it has.

    A key holds all that decides a point, so what is known under it need not be computed again.
    """
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    earlier = {point["key"]: point for point in known}
    return [
        point if point["figures"] else {**point, **earlier.get(point["key"], {})}
        for point in points
    ]


def _short(point: Point) -> str:
    """Return what the tables rest on, and the gates, as one line; numbers to six digits."""
    names = (
        *("key", "model", "method", "strategy", "seed", "target", "variant", "sampler", "keep"),
        *("extrapolation", "figures", "gain", "gain_over", "search_cost", "all_or_nothing_share"),
        *("pruned_ratio", "macs", "n_images"),
    )
    told = {name: point[name] for name in names}
    rounded = json.loads(json.dumps(told), parse_float=lambda text: float(f"{float(text):.6g}"))
    return json.dumps(rounded, separators=(",", ":"))


if __name__ == "__main__":
    main()
