"""Publisher: what tracker and report are given. Oracle: the points of the finished sweep itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.points import resolve_points
from orchestrator.publish import (
    Publisher,
    search_entry,
    stored_report,
    task_hours,
    verdict_tags,
)
from orchestrator.report.sections import rested_on
from orchestrator.store import open_store
from orchestrator.sweep_tasks import RunResult
from orchestrator.tracking import Entry, SweepRun
from tests.orchestrator.finished_sweep import Finished, finish
from tests.orchestrator.tiny_sweep import ALL_BASELINES, tiny_sweep


class ListTracker:
    """A tracker that only remembers."""

    def __init__(self) -> None:
        self.sweeps: list[SweepRun] = []
        self.entries: dict[str, Entry] = {}
        self.finished: list[dict[str, Any]] = []

    def start(self, sweep: SweepRun) -> None:
        self.sweeps.append(sweep)

    def log(self, entries: Iterable[Entry]) -> None:
        self.entries |= {entry.key: entry for entry in entries}

    def finish(
        self, state: str, *, entries: Iterable[Entry] = (), folder: Path, **details: Any
    ) -> None:
        self.log(entries)
        report = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.finished.append({"state": state, "report": report, **details})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    store = open_store(tmp_path_factory.mktemp("store"))
    return finish(tiny_sweep(targets=(0.5,), baselines=ALL_BASELINES), store)


@pytest.fixture(scope="module")
def tracker(finished: Finished) -> ListTracker:
    tracker = ListTracker()
    publisher = Publisher(finished.sweep, finished.store, tracker)
    publisher.start(finished.sweep, finished.plan)
    done = tuple(finished.store.records())
    publisher.finish(RunResult(plan=finished.plan, done=done))
    return tracker


def test_publisher_logs_every_search_and_point_once(
    finished: Finished, tracker: ListTracker
) -> None:
    searches = {task.key for task in finished.plan.tasks if task.kind == "search"}
    points = {point.key for point in finished.plan.points}
    kinds = {key: entry.kind for key, entry in tracker.entries.items()}
    assert kinds == {key: "search" for key in searches} | {key: "point" for key in points}


def test_publisher_logs_the_figures_of_a_point(finished: Finished, tracker: ListTracker) -> None:
    records = finished.store.records()
    points = resolve_points(finished.plan.points, records, finished.store)
    point = next(point for point in points if point.method == "search")
    metrics = tracker.entries[point.key].metrics
    assert metrics["psnr"] == point.value("psnr")
    assert metrics["speedup_low"] == point.speedup_low
    assert metrics["gain_clip/tiny"] == point.gain["clip"].value
    assert metrics["clip_low/tiny"] == point.figures["clip"].low
    assert tracker.entries[point.key].tags["dipgo.protocol"] == point.protocol
    assert tracker.entries[point.key].params["loss.alpha"] == "1.0"


def test_publisher_logs_gains_with_ends_and_what_the_search_cost(
    finished: Finished, tracker: ListTracker
) -> None:
    points = resolve_points(finished.plan.points, finished.store.records(), finished.store)
    point = next(point for point in points if point.method == "search")
    metrics, gain = tracker.entries[point.key].metrics, point.gain["psnr"]
    ends = (metrics["gain_psnr"], metrics["gain_psnr_low"], metrics["gain_psnr_high"])
    assert ends == (gain.value, gain.low, gain.high)
    assert metrics["gain_clip_low/tiny"] == point.gain["clip"].low
    assert (metrics["search_sample_forwards"], metrics["search_seconds"]) == (400.0, 100.0)


def test_publisher_tags_every_point_for_filters(finished: Finished, tracker: ListTracker) -> None:
    points = resolve_points(finished.plan.points, finished.store.records(), finished.store)
    for point in points:
        tags = tracker.entries[point.key].tags
        expected = point.method == "search" and point.verdict == "beats"
        assert tags["beats_trivial"] == str(expected).lower()
        assert tags["on_front"] in ("surely", "possibly", "no")
    knees = [e.key for e in tracker.entries.values() if e.tags.get("knee") == "true"]
    assert len(knees) <= 1 and all(
        tracker.entries[key].tags["beats_trivial"] == "true" for key in knees
    )


@pytest.mark.parametrize(
    ("method", "verdict", "tag"),
    [("search", None, "unknown"), ("search", "unknown", "unknown"), ("search", "beats", "true"),
     ("search", "ties", "false"), ("uniform", "beats", "false"), ("dense", None, "false")],
)  # fmt: skip
def test_tag_says_whether_a_point_beats_the_baselines(
    finished: Finished, method: Any, verdict: Any, tag: str
) -> None:
    points = resolve_points(finished.plan.points, finished.store.records(), finished.store)
    known = replace(points[0], method=method, verdict=verdict)
    assert verdict_tags(known, None) == {"beats_trivial": tag, "knee": "false", "on_front": "no"}


def test_note_of_a_point_has_its_figures_as_they_are_shown(
    finished: Finished, tracker: ListTracker
) -> None:
    points = resolve_points(finished.plan.points, finished.store.records(), finished.store)
    point = next(point for point in points if point.method == "search")
    note = tracker.entries[point.key].tags["mlflow.note.content"]
    assert f"- CLIP score (tiny): {point.figure_text('clip')}" in note
    assert f"baseline: {point.gain['clip'].text('clip')} (" in note
    assert point.protocol in note


def test_publisher_gives_each_point_its_files(finished: Finished, tracker: ListTracker) -> None:
    point = next(point for point in finished.plan.points if point.method == "search")
    files = tracker.entries[point.key].files()
    assert {"subnet.json", "gates.png", "samples.png"} == set(files)
    assert files["gates.png"].startswith(b"\x89PNG")


def test_publisher_logs_the_curve_of_a_search(finished: Finished, tracker: ListTracker) -> None:
    search = next(entry for entry in tracker.entries.values() if entry.kind == "search")
    record = finished.store.records()[search.key]
    curve = record.outputs["curve"]
    steps = list(zip(curve["search_step"], curve["loss"], strict=True))
    assert search.curves["loss"] == steps


def test_search_at_a_target_is_logged_with_its_target_and_its_cost(tmp_path: Path) -> None:
    sweep = tiny_sweep(targets=(0.3, 0.7), strategies=("auto",), metrics=("psnr",))
    done = finish(sweep, open_store(tmp_path))
    searches = [r for r in done.store.records().values() if r.kind == "search"]
    records = [r for r in searches if r.inputs["search"]["strategy"] == "auto"]
    entries = [search_entry(record, "auto") for record in records]
    assert {entry.params["target"] for entry in entries} == {"0.3", "0.7"}
    assert {entry.params["search.strategy"] for entry in entries} == {"auto"}
    assert {entry.params["errors"] for entry in entries} <= set(done.store.records())
    assert all(entry.metrics["sample_forwards"] == 400 for entry in entries)
    assert "search.loss.alpha" not in entries[0].params


def test_publisher_closes_with_report_and_hypervolume(
    finished: Finished, tracker: ListTracker
) -> None:
    (closing,) = tracker.finished
    assert closing["state"] == "done"
    assert closing["report"] == stored_report(finished.store, "tiny")
    assert "report.html" in closing["report"]
    series = closing["series"]["hypervolume/tiny/clip/tiny"]
    values = [value for _, value in series]
    assert values == sorted(values)  # a front never shrinks


def test_publisher_leaves_a_finished_report_alone(finished: Finished, tracker: ListTracker) -> None:
    report = Path(finished.store.sweep_file_place("tiny", "report/report.html"))
    before = report.stat().st_mtime_ns
    again = ListTracker()
    publisher = Publisher(finished.sweep, finished.store, again)
    publisher.finish(RunResult(plan=finished.plan))
    assert again.finished[0]["report"] == tracker.finished[0]["report"]
    assert report.stat().st_mtime_ns == before
    report.unlink()
    publisher.finish(RunResult(plan=finished.plan))
    assert report.exists()


def test_task_hours_add_up_in_order_of_completion(finished: Finished) -> None:
    records = finished.store.records()
    points = resolve_points(finished.plan.points, records, finished.store)
    order = ("images", "reference", "search", "evaluate", "latency")  # none before what it needs
    rested = {
        key: replace(record, timings={**record.timings, "finished": order.index(record.kind)})
        for key, record in rested_on(points, records, finished.store).items()
    }
    hours = task_hours(points, rested)
    total = sum(record.timings["seconds"] for record in records.values()) / 3600
    assert max(hours.values()) == pytest.approx(total)


def test_publisher_tells_how_the_run_ended(finished: Finished, tmp_path: Path) -> None:
    store = open_store(tmp_path)
    part = finish(finished.sweep, store, fails=lambda task: task.kind == "search")
    tracker = ListTracker()
    result = RunResult(plan=part.plan, done=("x",), failed={"a": "b"})
    Publisher(part.sweep, store, tracker).finish(result)
    assert tracker.finished[0]["state"] == "failed"
    failed = [entry for entry in tracker.entries.values() if entry.state == "failed"]
    assert all("out of memory" in entry.tags["dipgo.error"] for entry in failed)
    assert failed
