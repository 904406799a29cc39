"""Figures: fronts, gate heatmaps, rows of images, as PNG. matplotlib without pyplot."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from orchestrator.methods import TRIVIAL
from orchestrator.metrics import FIGURES, label_of, wants_log
from orchestrator.pareto import CROSSED, Front, is_crossed
from orchestrator.points import ResolvedPoint
from orchestrator.protocol_text import short
from orchestrator.standing import Dominance

#: Okabe and Ito's palette, told apart with any colour vision; markers differ as well.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C",
)  # fmt: skip
INK = "#3b4048"
#: How much is seen of points that are surely not on a front.
NOT_ON_FRONT = 0.35
FAINT = "#c9ced6"
LEGEND_COLUMNS = 5
#: Inches in which the longest entry of the legend fits.
NARROWEST = 4.6
_CROSS: Any = {"marker": "x", "markersize": 9, "markeredgewidth": 0.9, "color": INK}

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.6,
}


@dataclass(frozen=True)
class Mark:
    """How points of one kind are drawn."""

    label: str
    colour: str
    marker: str
    size: float = 6.5


_SEARCH_MARKERS = ("o", "P", "p", "h", "8", "X")


def mark_of(point: ResolvedPoint, strategies: Sequence[str]) -> Mark:
    """Return colour and shape of a point; strategies of searches differ in shape."""
    if point.is_searched:
        strategy = str(point.strategy)
        shape = _SEARCH_MARKERS[strategies.index(strategy) % len(_SEARCH_MARKERS)]
        return Mark(f"searched: {strategy}", BLUE, shape, 7.5)
    leading = (point.variant or "").endswith("leading")
    marks = {
        "dense": Mark("dense", BLACK, "*", 11),
        "few_steps": Mark(
            f"few steps, {point.variant or ''}".rstrip(", "), ORANGE, "<>"[not leading]
        ),
        "ays": Mark("Align Your Steps", ORANGE, "d", 6),
        "uniform": Mark("uniform skips", SKY, "s", 6),
        "deepcache": Mark("DeepCache", GREEN, "^", 6),
        "guidance_off": Mark("guidance off at the end", PURPLE, "H", 6),
        "best_step_mask": Mark("best step mask", VERMILION, "D", 6),
        "random": Mark("random gates", GREY, "v", 5.5),
    }
    return marks[point.method]


def fronts_figure(points: Sequence[ResolvedPoint], fronts: Sequence[Front]) -> Figure:
    """Draw every front: a row for each model, protocol and device, a column for each metric."""
    rows = list(dict.fromkeys((f.model, f.protocol, f.device) for f in fronts))
    columns = list(dict.fromkeys(f.objectives[1] for f in fronts))
    width, drawn = max(NARROWEST, 3.7 * len(columns)), 3.2 * max(1, len(rows))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, drawn))
        below = _legend_below(figure, legend_handles(points)) + 0.5  # tick and axis labels
        height = drawn + below - 0.45
        figure.set_size_inches(width, height)
        axes = figure.subplots(max(1, len(rows)), max(1, len(columns)), squeeze=False)
        figure.subplots_adjust(
            left=0.75 / width, right=1 - 0.1 / width, top=1 - 0.48 / height, bottom=below / height,
            wspace=0.28, hspace=0.46,
        )  # fmt: skip
        for cell in axes.flat:
            cell.set_axis_off()
        for front in fronts:
            row = rows.index((front.model, front.protocol, front.device))
            cell = axes[row, columns.index(front.objectives[1])]
            cell.set_axis_on()
            draw_front(cell, points, front)
    return figure


def _legend_below(figure: Figure, handles: Sequence[Line2D]) -> float:
    """Add a legend at the bottom in as many columns as fit; return its height in inches."""
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    for columns in range(LEGEND_COLUMNS, 0, -1):
        legend = figure.legend(
            handles=handles, loc="lower center", ncols=columns, frameon=False, fontsize=8
        )
        box = legend.get_window_extent(renderer)
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    return float(box.height / figure.dpi)


def draw_front(axes: Axes, points: Sequence[ResolvedPoint], front: Front) -> None:
    """Draw one front: all compared points with intervals, the front's line, and its knee."""
    speed, quality = front.objectives
    by_key = {point.key: point for point in points}
    compared = [by_key[key] for key in front.standing if key in by_key]
    strategies = _strategies(points)
    line = [by_key[key] for key in front.points]
    axes.plot(
        _values(line, speed), _values(line, quality),
        color=FAINT, linewidth=1.4, zorder=1,
    )  # fmt: skip
    groups: dict[tuple[Mark, Dominance], list[ResolvedPoint]] = {}
    for point in compared:
        standing = front.standing[point.key]
        groups.setdefault((mark_of(point, strategies), standing), []).append(point)
    for (mark, standing), group in groups.items():
        _draw_group(axes, group, front, mark, standing)
    _cross_out(axes, [p for p in compared if is_crossed(p, quality)], front)
    if front.knee is not None:
        knee = by_key[front.knee]
        axes.plot(
            _values([knee], speed), _values([knee], quality), marker="o", markersize=15,
            markerfacecolor="none", markeredgecolor=PURPLE, markeredgewidth=1.4, zorder=2,
        )  # fmt: skip
    _dress(axes, compared, front)


def _draw_group(
    axes: Axes, group: Sequence[ResolvedPoint], front: Front, mark: Mark, standing: Dominance
) -> None:
    """Draw points of one kind and standing, with their intervals."""
    values = [_values(group, name) for name in front.objectives]
    ends = [np.array([p.interval(name) for p in group]).T for name in front.objectives]
    reach = [
        np.abs(np.clip([value - low, high - value], 0, None))
        for value, (low, high) in zip(values, ends, strict=True)
    ]
    order = 3 + group[0].is_searched + (standing != "no")
    axes.errorbar(
        values[0], values[1], xerr=reach[0], yerr=reach[1],
        fmt=mark.marker, color=mark.colour, markersize=mark.size,
        markerfacecolor=mark.colour if standing == "surely" else "none",
        markeredgewidth=1.3, elinewidth=0.8,
        alpha=NOT_ON_FRONT if standing == "no" else 1.0, zorder=order,
    )  # fmt: skip


def _cross_out(axes: Axes, points: Sequence[ResolvedPoint], front: Front) -> None:
    """Draw a cross over each point; over those not on the front as faint as they are."""
    for faint in (False, True):
        group = [p for p in points if (front.standing[p.key] == "no") is faint]
        if group:
            axes.plot(
                *(_values(group, name) for name in front.objectives), linestyle="none",
                alpha=NOT_ON_FRONT if faint else 1.0, zorder=6, **_CROSS,
            )  # fmt: skip


def _values(points: Sequence[ResolvedPoint], figure: str) -> npt.NDArray[np.float64]:
    return np.array([point.value(figure) for point in points], dtype=np.float64)


def _dress(axes: Axes, compared: Sequence[ResolvedPoint], front: Front) -> None:
    """Title, labels and scales; better is always up and to the right."""
    speed, quality = front.objectives
    axes.set_title(
        front.model if front.device is None else f"{front.model} · {front.device}", pad=14
    )
    n = max(point.figures[quality].n for point in compared)
    known = any(point.bounds(quality) != (None, None) for point in compared)
    note = f"n = {n}{'' if known else ', no intervals'}, protocol {short(front.protocol)}"
    axes.annotate(note, (1, 1), xycoords="axes fraction", xytext=(0, 3),
                  textcoords="offset points", ha="right", va="bottom", fontsize=6.5)  # fmt: skip
    axes.set_xlabel(FIGURES[speed].label)
    label = label_of(quality, front.scorer)
    axes.set_ylabel(f"{label}, axis turned" if FIGURES[quality].lower_is_better else label)
    values = _values(compared, quality).tolist()
    if wants_log(quality, values):
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 1.25, max(values) * 1.25)
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if FIGURES[quality].lower_is_better:
        axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(6))


def legend_handles(points: Iterable[ResolvedPoint]) -> list[Line2D]:
    """Return one handle for each kind of point, and for the signs explained nowhere else."""
    listed = list(points)
    strategies = _strategies(listed)
    order = ("dense", "search", *TRIVIAL, "random")
    marks = {
        mark_of(point, strategies): None
        for point in sorted(listed, key=lambda p: order.index(p.method))
    }
    handles = [
        Line2D([], [], linestyle="none", marker=m.marker, color=m.colour, markersize=m.size,
               label=m.label)
        for m in marks
    ]  # fmt: skip
    handles += _standing_handles()
    handles.append(Line2D([], [], linestyle="none", label=CROSSED, **_CROSS))
    handles.append(
        Line2D([], [], linestyle="none", marker="o", markersize=12, color=PURPLE,
               markerfacecolor="none", label="knee")
    )  # fmt: skip
    return handles


def _standing_handles() -> list[Line2D]:
    """Return what full, hollow and faint markers mean."""
    signs = [
        ("full: surely on the front", INK, INK, 1.0),
        ("hollow: possibly on it", "none", INK, 1.0),
        ("faint: not on it", "none", INK, NOT_ON_FRONT),
    ]
    return [
        Line2D([], [], linestyle="none", marker="o", markerfacecolor=fill, markeredgecolor=edge,
               alpha=alpha, label=label)
        for label, fill, edge, alpha in signs
    ]  # fmt: skip


def _strategies(points: Iterable[ResolvedPoint]) -> list[str]:
    return sorted({str(point.strategy) for point in points if point.is_searched})


# --- gates -------------------------------------------------------------------------------------

SKIPPED, REUSED, COMPUTED = 0, 1, 2


def gates_figure(subnet: Mapping[str, Any]) -> Figure:
    """Draw the gates of a SubNet document: a column a call, with its timestep, a row a block."""
    states = gate_states(subnet["keep"])  # (N, T)
    names = [block["name"] or "denoiser" for block in subnet["blocks"]]
    rows, calls = states.shape
    with mpl.rc_context(_STYLE):
        left = 0.15 + 0.062 * max(len(name) for name in names)
        width, height = min(11.0, left + 0.1 + 0.27 * calls), 0.72 + 0.185 * rows
        figure = Figure(figsize=(width, height))
        axes = figure.subplots()
        figure.subplots_adjust(
            left=left / width, right=1 - 0.1 / width, top=1 - 0.05 / height, bottom=0.67 / height
        )
        axes.grid(visible=False)
        axes.pcolormesh(
            states, cmap=ListedColormap(["#eef0f3", "#b9d4ea", BLUE]), vmin=0, vmax=2,
            edgecolors="white", linewidth=0.8 if calls <= 60 else 0.0,
        )  # fmt: skip
        axes.invert_yaxis()
        axes.set_yticks(np.arange(rows) + 0.5, names, fontsize=7)
        every = max(1, -(-calls // 25))
        ticks = np.arange(0, calls, every)
        steps = [f"{float(subnet['sampler']['timesteps'][i]):.0f}" for i in ticks]
        axes.set_xticks(ticks + 0.5, steps, fontsize=7, rotation=90 if calls > 6 else 0)
        axes.set_xlabel("timestep of the call", fontsize=8)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return figure


def gate_states(keep: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return what each block does at each call: computed, reused, or the call is skipped.

    keep: rows of a SubNet, one a call; the first character is the denoiser itself.  # -> (N, T)
    """
    gates = np.array([[letter == "1" for letter in row] for row in keep])  # (T, N)
    states = np.where(gates, COMPUTED, REUSED)
    states[~gates[:, 0]] = SKIPPED
    return np.ascontiguousarray(states.T)


# --- images ------------------------------------------------------------------------------------


def image_row(images: npt.NDArray[np.uint8], *, side: int = 128) -> bytes:
    """Return images (B, 3, H, W) side by side as PNG; those larger than `side` are shrunk."""
    shrunk = _shrink(images, max(1, images.shape[-1] // side))
    height, gap = shrunk.shape[-2], max(1, shrunk.shape[-1] // 32)
    opaque = np.full((1, *shrunk.shape[-2:]), 255, dtype=np.uint8)
    space = np.zeros((4, height, gap), dtype=np.uint8)
    parts: list[npt.NDArray[np.uint8]] = []
    for image in shrunk:
        parts += [np.concatenate([image, opaque]), space]
    return _png(np.concatenate(parts[:-1], axis=-1).transpose(1, 2, 0))  # (H, W, 4)


def image_grid(rows: Sequence[npt.NDArray[np.uint8]], gap: int = 2) -> bytes:
    """Return rows of images, each (B, 3, H, W), below one another as PNG on white."""
    lines = []
    for images in rows:
        padded = np.pad(images, ((0, 0), (0, 0), (0, gap), (0, gap)), constant_values=255)
        lines.append(np.concatenate(list(padded), axis=-1))
    grid = np.concatenate(lines, axis=-2).transpose(1, 2, 0)
    return _png(grid)


def _shrink(images: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Average blocks of factor × factor pixels."""
    if factor == 1:
        return images
    batch, channels, height, width = images.shape
    cut = images[..., : height - height % factor, : width - width % factor]
    blocks = cut.reshape(batch, channels, height // factor, factor, width // factor, factor)
    shrunk: npt.NDArray[np.uint8] = blocks.mean(axis=(3, 5)).round().astype(np.uint8)
    return shrunk


def _png(pixels: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    imsave(buffer, np.ascontiguousarray(pixels), format="png")
    return buffer.getvalue()


# --- output ------------------------------------------------------------------------------------


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()
