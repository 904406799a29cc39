"""Gate heatmaps as small inline SVG whose colours follow the page."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from orchestrator.figures import COMPUTED, REUSED, gate_states

CELL = 13
ROW = 12
_CLASSES = {COMPUTED: "computed", REUSED: "reused"}


def gates_svg(subnet: Mapping[str, Any]) -> str:
    """Draw a SubNet document: a column a call with its timestep, a row a block.

    Cells of one kind are one path; a skipped call is left empty, but for a line through it.
    """
    states = gate_states(subnet["keep"])  # (N, T)
    rows, calls = states.shape
    cell = max(3, min(CELL, 900 // calls))
    names = [block["name"] or "denoiser" for block in subnet["blocks"]]
    left = 8 + 5.6 * max(len(name) for name in names)
    paths = [
        f'<path class="{label}" d="{_cells(states == state, left, cell)}"/>'
        for state, label in _CLASSES.items()
    ]
    bottom = ROW * rows
    width, height = left + cell * calls + 2, bottom + 28
    return (
        f'<svg class="gates" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" aria-label="gates, calls by blocks">'
        + "".join(paths)
        + _skip_marks(states, left, cell)
        + _row_labels(names, left)
        + _column_labels(subnet["sampler"]["timesteps"], left, cell, bottom)
        + "</svg>"
    )


def _cells(chosen: Any, left: float, cell: int) -> str:
    return "".join(
        f"M{left + cell * call:.1f} {ROW * block}h{cell - 1}v{ROW - 1}h-{cell - 1}z"
        for block, call in np.argwhere(chosen)
    )


def _skip_marks(states: Any, left: float, cell: int) -> str:
    skipped = np.flatnonzero((states == 0).all(axis=0))
    lines = "".join(
        f"M{left + cell * (call + 0.5) - 0.5:.1f} 2V{ROW * len(states) - 3}" for call in skipped
    )
    return f'<path class="skipped" d="{lines}"/>' if lines else ""


def _row_labels(names: list[str], left: float) -> str:
    return "".join(
        f'<text x="{left - 5:.1f}" y="{ROW * i + ROW - 3}" text-anchor="end">{escape(name)}</text>'
        for i, name in enumerate(names)
    )


def _column_labels(timesteps: list[Any], left: float, cell: int, bottom: int) -> str:
    every = max(1, -(-11 // cell))
    labels = []
    for call in range(0, len(timesteps), every):
        x, y = left + cell * (call + 0.5) + 2.5, bottom + 4
        labels.append(
            f'<text transform="translate({x:.1f} {y}) rotate(-90)" text-anchor="end">'
            f"{float(timesteps[call]):.0f}</text>"
        )
    return "".join(labels)
