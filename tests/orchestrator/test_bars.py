"""Bars: the figure a choice goes by, larger = better, and what an image reads against itself."""

from __future__ import annotations

import pytest

from orchestrator.bars import best_of, calibration_figures, judged_by, score_for
from orchestrator.records import Record


def record_of(metrics: dict[str, float], asked: tuple[str, ...]) -> Record:
    return Record(
        key="k",
        kind="evaluate",
        state="done",
        inputs={"protocol": {"metrics": list(asked)}},
        outputs={"metrics": {name: {"value": value} for name, value in metrics.items()}},
        timings={},
    )


@pytest.mark.parametrize("metric", ["fid", "kid", "cmmd", "psnr"])
def test_distances_of_distributions_are_judged_by_psnr(metric: str) -> None:
    assert judged_by(metric) == "psnr"


@pytest.mark.parametrize(
    ("metric", "better", "worse"),
    [("lpips", 0.1, 0.4), ("dino", 0.0, 0.2), ("clip", 31.0, 30.0), ("image_reward", 0.2, -1.0)],
)
def test_score_is_larger_where_the_figure_is_better(metric, better: float, worse: float) -> None:
    scores = [score_for(metric, {metric: value}) for value in (worse, better)]

    assert best_of(scores) == 1


def test_unknown_figure_has_no_score() -> None:
    assert score_for("lpips", {"psnr": 20.0}) is None
    assert best_of([0.3, None]) is None


def test_dense_run_loses_nothing_to_itself_in_what_was_asked() -> None:
    dense = record_of({"clip": 30.0}, asked=("psnr", "lpips", "clip"))

    known = calibration_figures(dense)

    assert (known["psnr"], known["lpips"], known["clip"]) == (100.0, 0.0, 30.0)
    assert known["ssim"] is None and known["dino"] is None
