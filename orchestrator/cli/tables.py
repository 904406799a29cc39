"""What is printed for people about a sweep: its file, plan, status, fronts and verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from dipgo_core.memory import Fit
from orchestrator.cli.show import print_table, say
from orchestrator.headlines import Headline, statements
from orchestrator.memory import GB, MemoryRow, without_repetition
from orchestrator.metrics import FIGURES, QUALITIES, label_of
from orchestrator.pareto import Front, front_table, knee_note, name_at_target, share_text
from orchestrator.planned import Plan
from orchestrator.points import ResolvedPoint
from orchestrator.protocol_text import short
from orchestrator.records import TaskKind
from orchestrator.sweep_settings import SweepFile

KINDS: tuple[TaskKind, ...] = get_args(TaskKind)


def print_sweep(file: Path, sweep: SweepFile) -> None:
    """Print what a valid sweep file asks for."""
    rows = [
        (
            model.name,
            model.settings.id,
            f"{model.sampler.scheduler}, {model.sampler.steps} steps",
            ", ".join(f"{target:g}" for target in model.targets),
            f"{len(model.grid)}",
            ", ".join(baseline.name for baseline in model.baselines),
            ", ".join(map(str, model.evaluate.rungs or (model.evaluate.images,))),
        )
        for model in sweep.models
    ]
    columns = ("model", "id", "sampler", "targets", "searches", "baselines", "images")
    print_table(f"{file} is valid: {sweep.name}", columns, rows, right=("searches", "images"))


def print_plan(planned: Plan, name: str, storage: str) -> None:
    """Print how many tasks of each kind there are, and how many are done."""
    plan = planned.to_json()
    counts = Counter((task["kind"], task["state"] == "cached") for task in plan["tasks"])
    rows = [
        (kind, f"{counts[kind, True] + counts[kind, False]}", f"{counts[kind, True]}")
        for kind in KINDS
    ]
    title = (
        f"{name}: {plan['models']} models, {plan['searches']} searches, "
        f"{plan['evaluations']} evaluations of searched SubNets, {plan['baselines']} of baselines"
    )
    print_table(title, ("tasks", "in all", "in the store"), rows, right=("in all", "in the store"))
    say(f"{len(plan['tasks']) - plan['cached']} tasks to do; storage {storage}")


def print_memory(rows: Sequence[MemoryRow]) -> None:
    """Print what each kind of work is estimated to hold of a GPU."""
    lines = [
        (row.model, row.kind, row.label, _gigabytes(row.fit), "; ".join(row.choices), row.basis)
        for row in without_repetition(rows)
    ]
    columns = ("model", "task", "of", "peak GB", "run so that it fits", "estimated from")
    print_table(
        "GPU memory, estimated (docs/memory.md)",
        columns,
        lines,
        right=("peak GB",),
    )


def _gigabytes(fit: Fit) -> str:
    """Return the estimate, as a lower bound where not all is known, of what the GPU has."""
    need = f"{'over ' if fit.need.unknown else ''}{fit.need.total / GB:.1f}"
    there = "" if fit.limit is None else f" of {fit.limit / GB:.1f}"
    return f"{need}{there}{' (too large)' if fit.fits is False else ''}"


def print_fronts(points: Sequence[ResolvedPoint], fronts: Iterable[Front]) -> None:
    """Print every front as a table, slowest point first; the knee is marked."""
    shown = list(fronts)
    for front in shown:
        _print_front(points, front)
    for point in points:
        if point.dropped is not None:
            lost = point.dropped
            beaten = ", ".join(label_of(metric, point.scorer(metric)) for metric in lost.by)
            say(
                f"dropped by racing at n={lost.images}: {point.model}: {name_at_target(point)}, "
                f"surely beaten in {beaten}"
            )
    if not shown:
        say("no fronts yet: nothing is finished; `dipgo-sweep run` the sweep first")


def _print_front(points: Sequence[ResolvedPoint], front: Front) -> None:
    speed, metric = front.objectives
    quality = label_of(metric, front.scorer)
    by_key = {point.key: point for point in points}
    where = f" on {front.device}" if front.device else ""
    images = max((by_key[key].n_images or 0 for key in front.points), default=0)
    title = (
        f"{front.model}{where}: {FIGURES[speed].label} against {quality}, "
        f"{FIGURES[metric].better}; {images} images, protocol {short(front.protocol)}"
    )
    rows = [
        (
            " = ".join(row.names) + (" (knee)" if row.knee else ""),
            row.speedup,
            row.quality,
            row.standing + ("" if row.on_line else ", behind"),
            row.gain,
            row.verdict,
            row.share,
            row.cost,
            row.key[:12],
        )
        for row in front_table(points, front)
    ]
    columns = (
        "point", FIGURES[speed].label, quality, "on the front", "gain over the best baseline", "",
        "all-or-nothing calls", "search cost", "key",
    )  # fmt: skip
    print_table(title, columns, rows, right=(*columns[1:3], columns[4]))
    for note in filter(None, (knee_note(points, front), front.racing_note)):
        say(note)
    if front.disturbed:
        names = ", ".join(name_at_target(by_key[key]) for key in front.disturbed)
        reason = next(iter(front.disturbed.values()))
        say(f"no measured speed, for it was disturbed: {names} (the first: {reason})")
        say("to measure again when nothing else runs, raise `latency.repeat` (docs/latency.md)")


def print_verdicts(points: Sequence[ResolvedPoint], lines: Sequence[Headline]) -> None:
    """Print for each model and target what the searched SubNet gains over its bars.

    Gains by two networks are on two scales: one table each.
    """
    for sentence in statements(lines, points):
        say(sentence)
    by_label: dict[str, list[Headline]] = {}
    for line in lines:
        by_label.setdefault(label_of(line.quality, line.scorer), []).append(line)
    for label, listed in by_label.items():
        _print_verdicts(points, label, listed)


def _print_verdicts(points: Sequence[ResolvedPoint], label: str, lines: Sequence[Headline]) -> None:
    by_key = {point.key: point for point in points}
    rows = [row for line in lines for row in _verdict_rows(by_key, line)]
    columns = (
        "model", "protocol", "target", "SubNet", "metric", "gain", "verdict",
        "best trivial baseline", "gain over random gates", "all-or-nothing calls", "search cost",
    )  # fmt: skip
    title = f"Searched SubNets, the best in {label} on calibration prompts, at equal compute: gains"
    print_table(f"{title} (95 % intervals)", columns, rows)


def _verdict_rows(by_key: Mapping[str, ResolvedPoint], line: Headline) -> Iterator[tuple[str, ...]]:
    """Return a row a metric, the headline's own first; what they share is in the first row."""
    point = by_key[line.searched]
    cost = "" if point.search_cost is None else point.search_cost.text
    named = (line.model, short(line.protocol), f"{line.target:g}", point.name)
    ended = (share_text(point), cost)
    others = [metric for metric in QUALITIES if metric in line.gains and metric != line.quality]
    for metric in (line.quality, *others):
        shared = metric == line.quality
        gain, random = line.gains.get(metric), point.gain_random.get(metric)
        yield (
            *(named if shared else ("",) * len(named)),
            label_of(metric, point.scorer(metric)),
            gain.text(metric) if gain else "",
            gain.verdict if gain else "not known yet",
            by_key[gain.baseline_key].name if gain else "",
            f"{random.text(metric)} {random.verdict}" if random else "",
            *(ended if shared else ("",) * len(ended)),
        )
