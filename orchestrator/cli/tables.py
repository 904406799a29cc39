"""What is printed for people about a sweep: its file, plan, status, fronts and verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from dipgo_core.memory import Fit
from orchestrator.cli.show import print_table, say
from orchestrator.headlines import Headline
from orchestrator.memory import GB, MemoryRow, without_repetition
from orchestrator.metrics import FIGURES, label_of
from orchestrator.pareto import Front, front_table, name_at_target
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
            row.key[:12],
        )
        for row in front_table(points, front)
    ]
    columns = (
        "point", FIGURES[speed].label, quality, "on the front", "gain over the best baseline", "",
        "key",
    )  # fmt: skip
    print_table(title, columns, rows, right=(*columns[1:3], columns[4]))
    if front.racing_note:
        say(front.racing_note)
    if front.disturbed:
        names = ", ".join(name_at_target(by_key[key]) for key in front.disturbed)
        reason = next(iter(front.disturbed.values()))
        say(f"no measured speed, for it was disturbed: {names} (the first: {reason})")
        say("to measure again when nothing else runs, raise `latency.repeat` (docs/latency.md)")


def print_verdicts(points: Sequence[ResolvedPoint], lines: Iterable[Headline]) -> None:
    """Print for each model and target whether the searched SubNet beats its bars.

    Gains by two networks are on two scales: one table each.
    """
    by_label: dict[str, list[Headline]] = {}
    for line in lines:
        by_label.setdefault(label_of(line.quality, line.scorer), []).append(line)
    for label, listed in by_label.items():
        _print_verdicts(points, label, listed)


def _print_verdicts(points: Sequence[ResolvedPoint], label: str, lines: Sequence[Headline]) -> None:
    by_key = {point.key: point for point in points}
    rows = [
        (
            line.model,
            short(line.protocol),
            f"{line.target:g}",
            by_key[line.searched].name,
            *_against(by_key, line),
            line.gain_random.text(line.quality) if line.gain_random else "",
            line.verdict_random or "not known yet",
        )
        for line in lines
    ]
    columns = (
        "model", "protocol", "target", "SubNet", "best trivial baseline", "gain", "verdict",
        "gain over random gates", "verdict",
    )  # fmt: skip
    title = f"Searched SubNets at equal compute: gain in {label} (95 % intervals)"
    print_table(title, columns, rows)


def _against(by_key: dict[str, ResolvedPoint], line: Headline) -> tuple[str, str, str]:
    baseline = by_key[line.baseline].name if line.baseline in by_key else ""
    gain = line.gain.text(line.quality) if line.gain else ""
    return baseline, gain, line.verdict or "not known yet"
