"""Publisher: shows a sweep to the tracker and writes its report, from the records alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orchestrator.bars import CALIBRATION_METRICS
from orchestrator.export import export_subnet, is_subnet
from orchestrator.gains import Comparisons
from orchestrator.metrics import IMAGE_FIGURES, label_of, tracking_name
from orchestrator.pareto import SPEED_OF, Front, hypervolume_series, pareto_fronts
from orchestrator.planned import Plan
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.records import Record, Task, content_key
from orchestrator.search_cost import BEGUN_WITH
from orchestrator.search_cost import SPENT as SEARCH_SPENT
from orchestrator.speeds import TIMES
from orchestrator.store import Store
from orchestrator.sweep_settings import SweepFile
from orchestrator.sweep_tasks import RunResult
from orchestrator.tracking import Entry, RunState, SweepRun, Tracker

COUNTS = (
    *("pruned_ratio", "macs", "macs_speedup", "all_or_nothing_share", "extrapolation", "n_images"),
    *(f"calibration_{metric}" for metric in CALIBRATION_METRICS),
)
PARAMS = (
    *("model", "model_id", "method", "strategy", "granularity", "target", "seed", "variant"),
    *("name", "device"),
)
#: Files of a sweep in the store: the folder of its report, and what that shows.
REPORT = "report"
STAMP = "report.sha256"
#: What the tags of a point say, so that runs are found by `tags.knee = 'true'` and the like.
_TRUTH = {True: "true", False: "false"}
#: What a search cost, and what it says of a SubNet of its own.
SPENT = ("forwards", "sample_forwards", "seconds", "peak_memory_bytes", "all_or_nothing_share")
CURVES = ("loss", "consistency", "sparsity", "compute_ratio", "kept_gates", "flips")


class Publisher:
    """The driver's audience: searches are logged as they land, points and the report at the end.

    points, fronts: as `finish` found and showed them.
    """

    def __init__(self, sweep: SweepFile, store: Store, tracker: Tracker) -> None:
        self.sweep = sweep
        self.store = store
        self.tracker = tracker
        self.points: tuple[ResolvedPoint, ...] = ()
        self.fronts: tuple[Front, ...] = ()

    def start(self, sweep: SweepFile, plan: Plan) -> None:
        summary = {name: str(value) for name, value in plan.to_json().items() if name != "tasks"}
        del summary["cached"]  # differs from run to run
        models = ", ".join(model.name for model in sweep.models)
        params = {**summary, "models": models, "storage": self.store.url}
        self.tracker.start(SweepRun(name=sweep.name, digest=sweep.digest, params=params))

    def landed(self, record: Record, task: Task) -> None:
        if record.kind == "search":
            self.tracker.log([search_entry(record, task.label)])

    def finish(self, result: RunResult) -> None:
        """Write the report, log what is not logged yet, and close the runs."""
        objective = self.sweep.objective
        records = self.store.records()
        comparisons = Comparisons(self.store, records)
        points = resolve_points(
            result.plan.points,
            records,
            self.store,
            quality=objective.quality,
            comparisons=comparisons,
        )
        fronts = pareto_fronts(
            points,
            speed=SPEED_OF[objective.speed],
            differences=comparisons.difference,
            knee=objective.knee,
        )
        self.points, self.fronts = points, fronts
        with TemporaryDirectory(prefix="dipgo-report-") as folder:
            try:
                self._write_report(result, points, fronts, Path(folder))
            finally:
                self._track(result, records, Path(folder))

    def _track(self, result: RunResult, records: Mapping[str, Record], report: Path) -> None:
        """Send what the tracker lacks and close its runs."""
        from orchestrator.report.sections import rested_on

        points, fronts = self.points, self.fronts
        hours = task_hours(points, rested_on(points, records, self.store))
        series = {
            tracking_name(f"hypervolume/{front.model}/{front.objectives[1]}", front.scorer): [
                (round(3600 * spent), value)
                for spent, value in hypervolume_series(points, front, hours)
            ]
            for front in fronts
        }
        entries = self._entries(result.plan, points, records)
        self.tracker.finish(run_state(result), entries=entries, folder=report, series=series)

    def _write_report(
        self,
        result: RunResult,
        points: tuple[ResolvedPoint, ...],
        fronts: tuple[Front, ...],
        folder: Path,
    ) -> None:
        """Write the report into `folder` and the store, or take it from there if it is the same."""
        cached = sorted(task.key for task in result.plan.tasks if task.state == "cached")
        shown = content_key([self.sweep.digest, cached, dict(result.failed)]).encode()
        if self.store.get_sweep_file(self.sweep.name, STAMP) == shown:
            files = stored_report(self.store, self.sweep.name)
            if "report.html" in files:
                for name, data in files.items():
                    (folder / name).write_bytes(data)
                return
        from orchestrator.report import write_report  # matplotlib takes a second to import

        write_report(self.sweep, points, fronts, self.store, folder)
        put_report(self.store, self.sweep.name, folder)
        self.store.put_sweep_file(self.sweep.name, STAMP, shown)

    def _entries(
        self, plan: Plan, points: tuple[ResolvedPoint, ...], records: Mapping[str, Record]
    ) -> Iterator[Entry]:
        for planned in plan.tasks:
            if planned.kind == "search" and planned.state == "cached":
                yield search_entry(records[planned.key], planned.label)
        for point in points:
            if point.state != "pending":
                front = headline_front(point, self.fronts, self.sweep.objective.quality)
                yield point_entry(point, records, self.store, self.sweep, front)


def put_report(store: Store, sweep: str, folder: Path) -> None:
    """Keep the files of a report in the store, the page last: it tells that the rest is there."""
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix == ".html", path.name)):
        store.put_sweep_file(sweep, f"{REPORT}/{path.name}", path.read_bytes())


def stored_report(store: Store, sweep: str) -> dict[str, bytes]:
    """Return the files of the report in the store, by name."""
    names = store.sweep_files(sweep, REPORT)
    found = ((name, store.get_sweep_file(sweep, name)) for name in names)
    return {name.removeprefix(f"{REPORT}/"): data for name, data in found if data is not None}


def run_state(result: RunResult) -> RunState:
    """Return how the run ended, as the tracker calls it."""
    if result.interrupted:
        return "interrupted"
    return "failed" if result.failed else "done"


def search_entry(record: Record, label: str) -> Entry:
    """Return a search as the tracker shows it: its settings, its cost and its curves."""
    inputs, outputs = record.inputs, record.outputs
    curve = outputs["curve"]
    asked = {
        name: inputs[name]
        for name in ("search", "target", "macs_convention", *BEGUN_WITH)
        if name in inputs
    }
    spent = {name: float(outputs[name]) for name in SPENT if outputs.get(name) is not None}
    return Entry(
        key=record.key,
        kind="search",
        name=label,
        params=_flat({"model": inputs["model"]["id"], **asked}),
        metrics=spent,
        curves={
            name: list(zip(curve["search_step"], map(float, curve[name]), strict=True))
            for name in CURVES
            if name in curve
        },
    )


def point_entry(
    point: ResolvedPoint,
    records: Mapping[str, Record],
    store: Store,
    sweep: SweepFile,
    front: Front | None,
) -> Entry:
    """Return a point as the tracker shows it: figures, gains, SubNet, gates, samples.

    front: where it is compared with others in the sweep's own quality metric.
    """
    settings = {name: getattr(point, name) for name in PARAMS}
    where = f" at {point.target:g}" if point.target is not None else ""
    tags = {
        "dipgo.protocol": point.measured_under,
        "dipgo.state": point.state,
        "mlflow.note.content": figures_note(point) if point.is_evaluated else "",
        "dipgo.verdict": point.verdict or "",
        "dipgo.error": point.error or "",
    }
    return Entry(
        key=point.key,
        kind="point",
        name=f"{point.model}: {point.name}{where}",
        state="failed" if point.state == "failed" else "done",
        params=_flat({**settings, "loss": point.loss or {}, "sampler": point.sampler}),
        metrics=tracked_figures(point),
        tags={name: value for name, value in tags.items() if value} | verdict_tags(point, front),
        files=partial(point_files, point, records, store, sweep),
    )


def headline_front(point: ResolvedPoint, fronts: Iterable[Front], quality: str) -> Front | None:
    """Return the front in the sweep's own quality metric on which a point is compared."""
    own = (front for front in fronts if front.objectives[1] == quality)
    return next((front for front in own if point.key in front.standing), None)


def verdict_tags(point: ResolvedPoint, front: Front | None) -> dict[str, str]:
    """Return what filters go by; all of them for every point, so that none outlives a change.

    beats_trivial: of a searched point unknown where there is no verdict (yet); false of all others.
    on_front: surely, possibly, no.
    """
    unknown = point.is_searched and point.verdict in (None, "unknown")
    beats = _TRUTH[point.is_searched and point.verdict == "beats"]
    return {
        "beats_trivial": "unknown" if unknown else beats,
        "knee": _TRUTH[front is not None and front.knee == point.key],
        "on_front": "no" if front is None else front.standing[point.key],
    }


def tracked_figures(point: ResolvedPoint) -> dict[str, float]:
    """Return every figure by the name it is tracked under, which says what network scored it."""
    found: dict[str, float | None] = {name: getattr(point, name) for name in COUNTS}
    for name in (*IMAGE_FIGURES, *TIMES):
        scorer, (low, high) = point.scorer(name), point.bounds(name)
        ends = {"": point.value(name), "_low": low, "_high": high}
        found |= {tracking_name(name, scorer, end=end): value for end, value in ends.items()}
    found |= {"peak_memory_mb": point.peak_memory_mb, "energy_j": point.energy_j}
    for size, rate in point.throughput.items():
        found[f"images_per_second/batch-{size}"] = rate["value"]
    for name, gain in point.gain.items():
        ends = {"": gain.value, "_low": gain.low, "_high": gain.high}
        found |= {
            tracking_name(name, point.scorer(name), prefix="gain_", end=end): value
            for end, value in ends.items()
        }
    for name in SEARCH_SPENT:
        found[f"search_{name}"] = getattr(point.search_cost, name, None)
    return {name: float(value) for name, value in found.items() if value is not None}


def figures_note(point: ResolvedPoint) -> str:
    """Return what a run's page says of its point: figures with intervals, as Markdown."""
    names = ("macs_speedup", *TIMES, *IMAGE_FIGURES)
    shown = [name for name in names if point.value(name) is not None]
    lines = [f"- {label_of(n, point.scorer(n))}: {point.figure_text(n)}" for n in shown]
    lines += [
        f"- gain in {label_of(n, point.scorer(n))} over the best trivial baseline: "
        f"{gain.text(n)} ({gain.verdict})"
        for n, gain in point.gain.items()
    ]
    where = f"{point.n_images} images, protocol `{point.measured_under}`"
    return "\n".join([f"{where}, 95 % intervals", "", *lines])


def point_files(
    point: ResolvedPoint, records: Mapping[str, Record], store: Store, sweep: SweepFile
) -> dict[str, bytes]:
    """Return the files of an evaluated point: the SubNet, if it is one, its gate heatmap, its first
    images."""
    record = records.get(point.evaluate_key or "")
    if record is None:
        return {}
    from orchestrator.figures import gates_figure, image_grid, to_png
    from orchestrator.report.sections import samples

    files: dict[str, bytes] = {}
    if is_subnet(record):
        subnet = export_subnet(point, records, sweep).to_json()
        files = {
            "subnet.json": json.dumps(subnet, indent=1).encode(),
            "gates.png": to_png(gates_figure(subnet), dpi=100),
        }
    images = samples(point, records, store)
    return files if images is None else {**files, "samples.png": image_grid([images])}


def task_hours(
    points: tuple[ResolvedPoint, ...], records: Mapping[str, Record]
) -> dict[str, float]:
    """Return the task-hours the sweep had spent when each finished point was complete.

    records: of all tasks that the points rest on.
    """
    finished = sorted(records.values(), key=lambda record: record.timings.get("finished", 0.0))
    spent, total = dict[str, float](), 0.0
    for record in finished:
        total += record.timings.get("seconds", 0.0) / 3600
        spent[record.key] = total
    return {
        point.key: max(spent.get(key, 0.0) for key in point.task_keys)
        for point in points
        if point.state == "done" and point.task_keys
    }


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested settings as ``a.b`` to text, without what is None."""
    flat: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            flat[prefix + name] = str(value)
    return flat
