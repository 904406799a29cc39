"""Drawings: nothing of a legend lies outside of its figure."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from orchestrator.figures import fronts_figure
from orchestrator.pareto import Front, pareto_fronts
from orchestrator.points import ResolvedPoint, resolve_points
from orchestrator.store import open_store
from tests.orchestrator.finished_sweep import finish
from tests.orchestrator.tiny_sweep import ALL_BASELINES, tiny_sweep

Drawn = tuple[tuple[ResolvedPoint, ...], tuple[Front, ...]]


@pytest.fixture
def drawn(tmp_path: Path) -> Drawn:
    store = open_store(tmp_path)
    plan = finish(tiny_sweep(baselines=ALL_BASELINES), store).plan
    points = resolve_points(plan.points, store.records(), store)
    return points, pareto_fronts(points)


@pytest.mark.parametrize("metrics", [1, 2])
def test_legend_lies_within_the_figure_and_below_the_axes(drawn: Drawn, metrics: int) -> None:
    points, fronts = drawn
    wanted = list(dict.fromkeys(front.objectives[1] for front in fronts))[:metrics]
    assert len(wanted) == metrics
    figure = fronts_figure(points, [f for f in fronts if f.objectives[1] in wanted])
    (legend,) = figure.legends
    renderer = FigureCanvasAgg(figure).get_renderer()
    box = legend.get_window_extent(renderer)
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0
    seen = [axes for axes in figure.axes if axes.axison]
    assert box.y1 <= min(axes.get_tightbbox(renderer).y0 for axes in seen)
