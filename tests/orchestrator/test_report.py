"""The report of a made-up finished sweep: what it must say, and that it stands alone."""

import csv
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from matplotlib.image import imread

from orchestrator.cli.tables import print_fronts
from orchestrator.figures import gate_states, gates_figure, image_row, to_png
from orchestrator.pareto import CROSSED, Front, is_crossed, pareto_fronts
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.report import FILES, write_report
from orchestrator.report.front_svg import Scale, front_svg, ticks
from orchestrator.report.gain_tables import gain_tables
from orchestrator.report.gates_svg import gates_svg
from orchestrator.report.measured import point_tables, race_tables
from orchestrator.report.sections import (
    costs,
    gate_cards,
    headline_rows,
    protocols,
    rested_on,
)
from orchestrator.store import open_store
from tests.orchestrator.finished_sweep import Finished, finish
from tests.orchestrator.tiny_sweep import ALL_BASELINES, tiny_sweep


@dataclass(frozen=True)
class Written:
    """A report and what it was made of."""

    finished: Finished
    points: tuple[ResolvedPoint, ...]
    fronts: tuple[Front, ...]
    folder: Path

    @property
    def html(self) -> str:
        return (self.folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    sweep = tiny_sweep(
        targets=(0.5, 0.7), baselines=ALL_BASELINES, models=("first", "second"),
        metrics=("fid", "clip", "psnr", "latency"),
    )  # fmt: skip
    models = [replace(m, evaluate=replace(m.evaluate, images=64)) for m in sweep.models]
    store = open_store(tmp_path_factory.mktemp("store"))
    finished = finish(
        replace(sweep, models=tuple(models)),
        store,
        fails=lambda task: "second: uniform at 0.7" in task.label and task.kind == "evaluate",
    )
    points = resolve_points(finished.plan.points, store.records(), store)
    fronts = pareto_fronts(points)
    folder = tmp_path_factory.mktemp("report")
    write_report(finished.sweep, points, fronts, store, folder)
    return Written(finished, points, fronts, folder)


def test_report_writes_all_files(written: Written) -> None:
    assert {path.name for path in written.folder.iterdir()} == set(FILES)


def test_report_needs_no_network(written: Written) -> None:
    assert not re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', written.html)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", written.html)


def test_report_states_a_verdict_for_each_model_and_target(written: Written) -> None:
    rows = list(headline_rows(written.points, "clip"))
    assert [(row.model, row.target) for row in rows] == [
        ("first", "0.5"), ("first", "0.7"), ("second", "0.5"), ("second", "0.7"),
    ]  # fmt: skip
    assert rows.pop().against_baseline is None  # one of its baselines failed: the bar is open
    assert "not known yet" in written.html
    for row in rows:
        assert row.against_baseline is not None and row.against_random is not None
        assert row.against_baseline.text in written.html
        assert row.against_random.text in written.html


def test_first_table_has_every_gain_with_share_and_search_cost(written: Written) -> None:
    table = written.html[written.html.index('class="headline"') :].partition("</table>")[0]
    for row in headline_rows(written.points, "clip"):
        assert [claim.metric.split(" ")[0] for claim in row.claims][:1] in (["CLIP"], [])
        for metric, gain in row.searched.gain.items():
            assert f"{gain.text(metric)}<small>" in table
        assert row.searched.search_cost is not None
        assert row.searched.search_cost.text in table
        assert f"{100 * (row.searched.all_or_nothing_share or 0):.0f} %" in table


def test_gains_over_each_baseline_are_in_every_form_of_the_report(written: Written) -> None:
    tables = gain_tables(written.points)
    assert [table.model for table in tables] == ["first", "second"]
    searched = [point for point in written.points if point.gain_over]
    assert sum(len(t.rows) for t in tables) == sum(len(p.gain_over) for p in searched)
    marked = [
        cell for t in tables for _, _, cells in t.rows for cell in cells if cell and cell.best
    ]
    assert len(marked) == sum(len(point.gain) for point in searched)
    markdown = (written.folder / "report.md").read_text("utf-8")
    document = json.loads((written.folder / "points.json").read_text("utf-8"))
    told = {p["key"]: p["gain_over"] for p in document["points"]}
    for point in searched:
        for key, gains in point.gain_over.items():
            assert all(gain.text(m) in written.html for m, gain in gains.items())
            assert all(gain.text(m) in markdown for m, gain in gains.items())
            assert set(told[point.key][key]) == set(gains)


def test_report_begins_with_the_answer_in_sentences(written: Written) -> None:
    document = json.loads((written.folder / "points.json").read_text("utf-8"))
    said = document["statements"]
    assert len(said) == 3 and "beats the best trivial baseline at the same compute" in said[0]
    assert all(escape(sentence) in written.html for sentence in said)
    assert written.html.index(escape(said[0])) < written.html.index("<table")
    assert escape(CROSSED) in written.html


def test_report_lists_every_point(written: Written) -> None:
    table = written.html[written.html.index('table class="points"') :]
    assert all(f'data-key="{point.key}"' in table for point in written.points)


def test_report_names_failures_with_their_cause(written: Written) -> None:
    section = written.html[written.html.index('section id="failed"') :]
    assert "out of memory" in section
    assert "second: uniform at 0.7" in section


def test_report_shows_dense_searched_and_baseline_images(written: Written) -> None:
    section = written.html[written.html.index('id="images"') : written.html.index('id="gates"')]
    assert section.count("data:image/png") == 3 * 3 + 2  # no baseline where one failed
    assert section.count("best trivial baseline") >= 3


def test_report_draws_every_distinct_subnet_once(written: Written) -> None:
    cards = gate_cards(written.points, written.finished.store.records())
    drawn = {
        (p.model, p.subnet)
        for p in written.points
        if p.keep and "0" in "".join(p.keep) and p.is_evaluated
    }
    assert len(cards) == len(drawn) == written.html.count('<svg class="gates"')


def test_report_escapes_what_it_shows(written: Written, tmp_path: Path) -> None:
    nasty = replace(written.points[-1], name="<script>alert(1)</script>", state="failed")
    points = (*written.points[:-1], nasty)
    write_report(written.finished.sweep, points, (), written.finished.store, tmp_path)
    assert "<script>alert" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_is_not_written_again_unless_it_changes(written: Written) -> None:
    args = (written.finished.sweep, written.points, written.fronts, written.finished.store)
    before = (written.folder / "report.html").stat().st_mtime_ns
    write_report(*args, written.folder)
    assert (written.folder / "report.html").stat().st_mtime_ns == before


def test_report_of_nothing_finished_is_written(written: Written, tmp_path: Path) -> None:
    path = write_report(written.finished.sweep, (), (), written.finished.store, tmp_path)
    assert "No searched point is done yet" in path.read_text(encoding="utf-8")


def test_points_csv_has_a_line_a_point(written: Written) -> None:
    rows = list(csv.DictReader(io.StringIO((written.folder / "points.csv").read_text("utf-8"))))
    assert [row["key"] for row in rows] == [point.key for point in written.points]
    gains = [float(row["gain_clip (tiny)"]) for row in rows if row["gain_clip (tiny)"]]
    assert gains == [p.gain["clip"].value for p in written.points if "clip" in p.gain]


def test_fid_infinity_is_shown_beside_fid_and_is_no_objective(written: Written) -> None:
    head = written.html[written.html.index('table class="points"') :].partition("</thead>")[0]
    assert head.index(">FID<") < head.index(">FID∞<") < head.index(">CLIP score<")
    assert "fid_infinity (tiny)" in (written.folder / "points.csv").read_text("utf-8")
    assert "fid_infinity" not in {front.objectives[1] for front in written.fronts}


def test_only_measured_metrics_are_shown(written: Written) -> None:
    for name in ("report.html", "report.md", "points.csv"):
        text = (written.folder / name).read_text("utf-8")
        assert "(tiny)" in text
        assert not any(word in text for word in ("LPIPS", "lpips", "ImageReward", "cmmd_low"))


def test_scorer_is_named_wherever_a_figure_is(written: Written) -> None:
    label = "CLIP score (tiny)"
    assert f"### first on a quiet cpu: speed-up, measured, × / {label}" in (
        written.folder / "report.md"
    ).read_text("utf-8")
    drawing = front_svg(written.points, next(f for f in written.fronts if f.scorer == "tiny"))
    assert "(tiny)" in drawing
    tips = json.loads(re.findall(r'id="tips">(.*?)</script>', written.html)[0])
    assert any(line.startswith(label) for tip in tips.values() for line in tip["lines"])


def test_protocol_section_says_everything_that_decides_a_figure(written: Written) -> None:
    section = written.html[written.html.index('section id="protocol"') :]
    (protocol,) = protocols(written.points, written.finished.store.records())
    assert protocol.hash in section and protocol.models == ("first", "second")
    for words in (
        "64 of the test split",
        "n = 64, 32 × 32 pixels, noise from seed 0",
        "float32",
        "scheduler ddim, steps 10, guidance scale 3.0",
        "the dense model&#39;s images",
    ):
        assert words in section, words  # fmt: skip


def test_standing_is_in_every_form_of_the_report(written: Written) -> None:
    front = next(f for f in written.fronts if f.objectives[1] == "clip")
    key = front.points[0]
    rows = csv.DictReader(io.StringIO((written.folder / "points.csv").read_text("utf-8")))
    standings = {row["key"]: row["standing_clip (tiny)"] for row in rows}
    assert {k: standings[k] for k in front.standing} == front.standing
    drawing = front_svg(written.points, front)
    assert f'{front.standing[key]}" data-key="{key}"' in drawing
    document = json.loads((written.folder / "points.json").read_text("utf-8"))
    assert document["fronts"][0]["standing"] == written.fronts[0].standing
    assert "| on the front |" in (written.folder / "report.md").read_text("utf-8")


def test_points_json_has_points_and_fronts(written: Written) -> None:
    document = json.loads((written.folder / "points.json").read_text("utf-8"))
    assert len(document["points"]) == len(written.points)
    assert len(document["fronts"]) == len(written.fronts) == 6


def test_markdown_tables_are_whole(written: Written) -> None:
    lines = (written.folder / "report.md").read_text("utf-8").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    # headlines, gains by model, fronts, points by protocol, latencies by model, costs, failures,
    # protocols
    assert len([line for line in tables if set(line) <= set("| -")]) == (
        1 + 2 + len(written.fronts) + 1 + 2 + 1 + 1 + 1
    )
    assert sum("first" in line or "second" in line for line in tables) >= len(written.points)


def test_costs_count_each_task_once(written: Written) -> None:
    store = written.finished.store
    records = rested_on(written.points, store.records(), store)
    spent = {cost.kind: cost for cost in costs(records.values())}
    stored = list(store.records().values())
    assert {k: c.tasks for k, c in spent.items()} == {
        kind: sum(record.kind == kind for record in stored) for kind in spent
    }
    assert spent["search"].seconds == 110.0 * spent["search"].tasks


def test_front_svg_draws_each_compared_point_and_its_bar(written: Written) -> None:
    front = written.fronts[0]
    drawing = front_svg(written.points, front)
    assert drawing.count('class="mark ') == drawing.count('class="bar ') == len(front.standing)
    assert drawing.count('class="knee"') == (front.knee is not None)
    crossed = [p for p in written.points if p.key in front.standing and is_crossed(p, "fid")]
    assert drawing.count('class="cross ') == len(crossed) > 0
    asked = pareto_fronts(written.points, knee="any")[0]
    assert front_svg(written.points, asked).count('class="knee"') == 1


def test_front_svg_puts_better_up_for_both_directions(written: Written) -> None:
    for front in written.fronts:
        drawing = front_svg(written.points, front)
        marks = dict(
            (key, float(y))
            for key, y in re.findall(r'data-key="(\w+)" transform="translate\(\S+ (\S+)\)', drawing)
        )
        first, last = front.points[0], front.points[-1]
        assert marks[first] <= marks[last]  # the slowest of a front has the best quality


def test_ticks_are_round_and_inside() -> None:
    assert ticks(Scale(0.9, 3.1, 0, 1)) == pytest.approx([1.0, 1.5, 2.0, 2.5, 3.0])
    assert ticks(Scale(0.8, 60.0, 0, 1, log=True)) == [1, 2, 5, 10, 20, 50]


def test_gate_states_tell_skipped_from_reused() -> None:
    states = gate_states(["111", "101", "000"])
    assert states.tolist() == [[2, 2, 0], [2, 1, 0], [2, 2, 0]]


def test_gate_drawings_label_blocks_and_timesteps(written: Written) -> None:
    card = gate_cards(written.points, written.finished.store.records())[0]
    drawing = gates_svg(card.subnet)
    assert all(f">{block['name'] or 'denoiser'}<" in drawing for block in card.subnet["blocks"])
    assert all(f">{step:.0f}<" in drawing for step in card.subnet["sampler"]["timesteps"])
    assert to_png(gates_figure(card.subnet), dpi=50).startswith(b"\x89PNG")


def test_image_row_keeps_the_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    row = imread(io.BytesIO(image_row(images)))  # (8, 3 * 8 + 2, 4), floats
    assert row.shape == (8, 26, 4)
    second = (row[:, 9:17, :3] * 255).round().astype(np.uint8)
    assert np.array_equal(second.transpose(2, 0, 1), images[1])


def test_image_row_averages_large_images() -> None:
    images = np.zeros((1, 3, 256, 256), dtype=np.uint8)
    images[..., ::2] = 200
    row = imread(io.BytesIO(image_row(images, side=64)))
    assert row.shape == (64, 64, 4)
    assert np.allclose(row[..., :3], 100 / 255, atol=1e-3)


@pytest.fixture(scope="module")
def raced(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """A report of a sweep whose points raced; many were dropped at the first rung."""
    sweep = tiny_sweep(
        targets=(0.3, 0.7), baselines=ALL_BASELINES, metrics=("fid", "kid", "clip", "psnr"),
        rungs=(32, 64),
    )  # fmt: skip
    store = open_store(tmp_path_factory.mktemp("store"))
    finished = finish(sweep, store)
    points = resolve_points(finished.plan.points, store.records(), store)
    fronts = pareto_fronts(points)
    folder = tmp_path_factory.mktemp("report")
    write_report(finished.sweep, points, fronts, store, folder)
    return Written(finished, points, fronts, folder)


def test_race_section_names_who_was_dropped_and_by_whom(raced: Written) -> None:
    lost = [point for point in raced.points if point.state == "dropped"]
    (table,) = race_tables(raced.points)
    assert lost and [row.point.key for row in table.rows] == [point.key for point in lost]
    assert all(row.images == 32 and set(row.by) >= {"PSNR to dense, dB"} for row in table.rows)
    distinct = {point.identity: point.n_images for point in raced.points}
    assert (table.images, table.without) == (sum(distinct.values()), 64 * len(distinct))
    section = raced.html[raced.html.index('id="racing"') :]
    assert f"{table.images} images made instead of {table.without}" in section


def test_figures_of_two_rungs_share_no_table_and_no_front(raced: Written) -> None:
    tables = point_tables(raced.points)
    assert len(tables) == 2
    assert [{p.n_images for p in table.points} for table in tables] == [{64}, {32}]
    compared = {key for front in raced.fronts for key in front.standing}
    assert not compared & {point.key for point in tables[1].points}


def test_fronts_that_were_not_raced_say_so(raced: Written, capsys: pytest.CaptureFixture) -> None:
    unsure = {front.objectives[1] for front in raced.fronts if front.racing_note}
    assert unsure == {"fid"}
    (note,) = (front.racing_note for front in raced.fronts if front.racing_note)
    print_fronts(raced.points, raced.fronts)
    for text in (raced.html, (raced.folder / "report.md").read_text("utf-8")):
        assert text.count(note) == 1
    assert capsys.readouterr().out.replace("\n", " ").count(note) == 1


def test_every_figure_in_the_csv_has_its_protocol(raced: Written) -> None:
    rows = csv.DictReader(io.StringIO((raced.folder / "points.csv").read_text("utf-8")))
    found = {row["protocol"] for row in rows}
    assert found == {p.hash for p in protocols(raced.points, raced.finished.store.records())}
    assert len(found) == 2


def test_protocols_of_a_report_say_in_what_they_differ(raced: Written) -> None:
    first, second = protocols(raced.points, raced.finished.store.records())
    assert first.differences == () and "images: 32 against 64" in second.differences
    for name in ("report.html", "report.md"):
        assert "images: 32 against 64" in (raced.folder / name).read_text("utf-8")


def test_latency_section_has_loop_throughput_memory_and_energy(written: Written) -> None:
    section = written.html[written.html.index('id="latency"') : written.html.index('id="costs"')]
    for words in (
        "denoising loop, ms",
        "images per second<small>batch 1",
        "peak memory, MB",
        ">700<",
        "energy of an image, J",
        "device a quiet cpu, threads 1",
    ):
        assert words in section, words  # fmt: skip
    point = next(p for p in written.points if p.loop_speedup)
    assert point.figure_text("loop_speedup").split(" ")[0] in section


def test_disturbed_latency_is_named_with_its_reason(written: Written, tmp_path: Path) -> None:
    noisy = [
        replace(p, speedup=None, latency_usable=False, latency_note="batch 1: a busy core")
        if p.method == "uniform" else p for p in written.points
    ]  # fmt: skip
    write_report(
        written.finished.sweep, noisy, pareto_fronts(noisy), written.finished.store, tmp_path
    )
    for name in ("report.html", "report.md", "points.csv"):
        assert "batch 1: a busy core" in (tmp_path / name).read_text("utf-8")
    assert "not usable" in (tmp_path / "report.html").read_text("utf-8")
