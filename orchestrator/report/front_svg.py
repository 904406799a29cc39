"""One front as inline SVG: colours follow the page, every point can be pointed at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from orchestrator.metrics import FIGURES, label_of, wants_log
from orchestrator.pareto import CROSSED, Front, is_crossed
from orchestrator.points import ResolvedPoint

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 26, 42

#: Outline of each kind of point around (0, 0); shapes differ as well as colours.
SHAPES: Mapping[str, str] = {
    "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "plus": "M-2 -5h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "hexagon": "M-5 0L-2.5 -4.5H2.5L5 0L2.5 4.5H-2.5z",
    "star": "M0 -7L1.8 -2.3L6.7 -2.2L2.9 0.9L4.1 5.7L0 3L-4.1 5.7L-2.9 0.9L-6.7 -2.2L-1.8 -2.3z",
    "left": "M-5.5 0L4 -5V5z",
    "right": "M5.5 0L-4 -5V5z",
    "square": "M-4.2 -4.2h8.4v8.4h-8.4z",
    "diamond": "M0 -5.6L5.6 0L0 5.6L-5.6 0z",
    "down": "M0 5.5L-5 -4H5z",
    "up": "M0 -5.5L-5 4H5z",
    "pentagon": "M0 -5.5L5.2 -1.7L3.2 4.4H-3.2L-5.2 -1.7z",
    "cross": "M-5 -2.5L-2.5 -5L0 -2.5L2.5 -5L5 -2.5L2.5 0L5 2.5L2.5 5L0 2.5L-2.5 5L-5 2.5L-2.5 0z",
}
#: Drawn over points that are not shown to beat the best trivial baseline.
CROSS = "M-6.5 -6.5L6.5 6.5M-6.5 6.5L6.5 -6.5"
_SEARCHED = ("circle", "plus", "hexagon")
_SHAPED: Mapping[str, str] = {
    "dense": "star",
    "ays": "cross",
    "uniform": "square",
    "best_step_mask": "diamond",
    "deepcache": "up",
    "guidance_off": "pentagon",
    "random": "down",
}


@dataclass(frozen=True)
class Scale:
    """Maps values of one axis to pixels, `low` at `start`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        bend: Callable[[float], float] = math.log if self.log else float
        low, high = bend(self.low), bend(self.high)
        value = max(value, self.low / 100) if self.log else value
        return self.start + (bend(value) - low) / (high - low) * (self.end - self.start)


def shape_of(point: ResolvedPoint, strategies: Sequence[str]) -> str:
    """Return the name of a point's shape; strategies of searches differ."""
    if point.is_searched:
        return _SEARCHED[strategies.index(str(point.strategy)) % len(_SEARCHED)]
    if point.method == "few_steps":
        return "left" if (point.variant or "").endswith("leading") else "right"
    return _SHAPED[point.method]


def strategies_of(points: Iterable[ResolvedPoint]) -> list[str]:
    return sorted({str(point.strategy) for point in points if point.is_searched})


def front_svg(points: Sequence[ResolvedPoint], front: Front) -> str:
    """Draw the compared points with their intervals, the front's line and its knee."""
    speed, quality = front.objectives
    by_key = {point.key: point for point in points}
    compared = [by_key[key] for key in front.standing]
    across, up = _scales(compared, front)
    at = {
        p.key: (across(x), up(y))
        for p, x, y in zip(
            compared, values_of(compared, speed), values_of(compared, quality), strict=True
        )
    }
    strategies = strategies_of(points)
    order = sorted(compared, key=lambda p: (front.standing[p.key] != "no", p.is_searched, p.key))
    ring = ""
    if front.knee is not None:
        x, y = at[front.knee]
        ring = f'<circle class="knee" cx="{x:.1f}" cy="{y:.1f}" r="10"/>'
    line = " ".join("{:.1f},{:.1f}".format(*at[key]) for key in front.points)
    return (
        f'<svg class="front" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(label_of(quality, front.scorer))} against {FIGURES[speed].label}">'
        + _axes(across, up, front)
        + f'<polyline class="line" points="{line}"/>'
        + "".join(_bars(p, front, across, up, at[p.key]) for p in order)
        + ring
        + "".join(_mark(p, front, at[p.key], shape_of(p, strategies)) for p in order)
        + "".join(_cross(p, front, at[p.key]) for p in order if is_crossed(p, quality))
        + "</svg>"
    )


def legend_entries(points: Sequence[ResolvedPoint]) -> list[tuple[str, str]]:
    """Return (small SVG, label) of every kind of point that occurs."""
    strategies = strategies_of(points)
    kinds: dict[tuple[str, str, str], None] = {}
    for point in points:
        names = {"search": f"searched: {point.strategy}", "random": "random gates"}
        label = names.get(point.method, point.method.replace("_", " "))
        label += f", {point.variant}" if point.method == "few_steps" else ""
        kinds[(point.method, shape_of(point, strategies), label)] = None
    entries = [(_icon(method, SHAPES[shape]), label) for method, shape, label in kinds]
    signs = {"surely": "surely on the front", "possibly": "possibly on it", "no": "not on it"}
    for standing, label in signs.items():
        entries.append((_icon("any", SHAPES["circle"], f" {standing}"), label))
    entries.append((f'<svg viewBox="-9 -9 18 18"><path class="cross" d="{CROSS}"/></svg>', CROSSED))
    return [*entries, ('<svg viewBox="-9 -9 18 18"><circle class="knee" r="7"/></svg>', "knee")]


def _icon(method: str, path: str, extra: str = "") -> str:
    return f'<svg viewBox="-9 -9 18 18"><path class="mark {method}{extra}" d="{path}"/></svg>'


def _scales(compared: Sequence[ResolvedPoint], front: Front) -> tuple[Scale, Scale]:
    """Return the axes; better is up, so that of a lower-is-better metric is turned."""
    speed, quality = front.objectives
    lower_is_better = FIGURES[quality].lower_is_better
    x_low, x_high = _padded(values_of(compared, speed))
    values = values_of(compared, quality)
    log = wants_log(quality, values)
    low, high = (min(values) / 1.25, max(values) * 1.25) if log else _padded(values)
    bottom, top = HEIGHT - BOTTOM, TOP
    start, end = (top, bottom) if lower_is_better else (bottom, top)
    return Scale(x_low, x_high, LEFT, WIDTH - RIGHT), Scale(low, high, start, end, log)


def values_of(points: Iterable[ResolvedPoint], figure: str) -> list[float]:
    """Return a figure of points that all have it."""
    return [value for point in points if (value := point.value(figure)) is not None]


def _padded(values: Sequence[float]) -> tuple[float, float]:
    span = max(values) - min(values) or max(abs(max(values)), 1.0) * 0.1
    return min(values) - 0.08 * span, max(values) + 0.08 * span


def ticks(scale: Scale) -> list[float]:
    """Return about five round values inside a scale: 1, 2, 5 times powers of ten."""
    if scale.log:
        decades = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        found = [m * 10.0**d for d in decades for m in (1, 2, 5)]
        inside = [value for value in found if scale.low <= value <= scale.high]
        return inside[:: max(1, -(-len(inside) // 6))]
    raw = (scale.high - scale.low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first = math.ceil(scale.low / step - 1e-9)
    last = math.floor(scale.high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _axes(across: Scale, up: Scale, front: Front) -> str:
    speed, quality = front.objectives
    bottom = HEIGHT - BOTTOM
    parts = []
    for value in ticks(across):
        x = across(value)
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
    for value in ticks(up):
        y = up(value)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        label = f"{value:.6g}"
        parts.append(f'<text x="{LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{FIGURES[speed].label} →</text>"
    )
    turned = ", axis turned" if FIGURES[quality].lower_is_better else ""
    label = escape(label_of(quality, front.scorer))
    parts.append(f'<text class="axis" x="{LEFT}" y="14">↑ {label}{turned}</text>')
    return "".join(parts)


def _bars(
    point: ResolvedPoint, front: Front, across: Scale, up: Scale, at: tuple[float, float]
) -> str:
    """Draw both intervals, cut off at the frame."""
    x, y = at
    lows = [min(max(across(v), LEFT), WIDTH - RIGHT) for v in point.interval(front.objectives[0])]
    ends = [min(max(up(v), TOP), HEIGHT - BOTTOM) for v in point.interval(front.objectives[1])]
    return (
        f'<path class="bar {point.method} {front.standing[point.key]}" data-key="{point.key}" '
        f'd="M{lows[0]:.1f} {y:.1f}'
        f'H{lows[1]:.1f}M{x:.1f} {ends[0]:.1f}V{ends[1]:.1f}"/>'
    )


def _mark(point: ResolvedPoint, front: Front, at: tuple[float, float], shape: str) -> str:
    return (
        f'<path class="mark {point.method} {front.standing[point.key]}" data-key="{point.key}" '
        f'transform="translate({at[0]:.1f} {at[1]:.1f})" d="{SHAPES[shape]}"/>'
    )


def _cross(point: ResolvedPoint, front: Front, at: tuple[float, float]) -> str:
    return (
        f'<path class="cross {front.standing[point.key]}" data-key="{point.key}" '
        f'transform="translate({at[0]:.1f} {at[1]:.1f})" d="{CROSS}"/>'
    )
