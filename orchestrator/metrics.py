"""The figures of a point: their names, and the one way a value is written with its interval."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dipgo_core.evaluation.metrics import METRICS


@dataclass(frozen=True)
class FigureKind:
    """How one figure is called and read.

    label: with its unit. decimals: of a value that is exact. counted: always exact, not estimated.
    """

    label: str
    decimals: int
    lower_is_better: bool = False
    counted: bool = False

    @property
    def better(self) -> str:
        return f"{'lower' if self.lower_is_better else 'higher'} is better"


#: Quality metrics in the order in which they are shown.
QUALITIES = ("fid", "kid", "cmmd", "clip", "image_reward", "psnr", "ssim", "lpips", "dino")

_LABELS: Mapping[str, tuple[str, int]] = {
    "fid": ("FID", 2),
    "kid": ("KID", 4),
    "cmmd": ("CMMD", 3),
    "clip": ("CLIP score", 2),
    "image_reward": ("ImageReward", 3),
    "psnr": ("PSNR to dense, dB", 2),
    "ssim": ("SSIM to dense", 3),
    "lpips": ("LPIPS to dense", 3),
    "dino": ("DINO distance to dense", 3),
}

FIGURES: Mapping[str, FigureKind] = {
    **{
        name: FigureKind(*_LABELS[name], lower_is_better=not METRICS[name].higher_is_better)
        for name in QUALITIES
    },
    "fid_infinity": FigureKind("FID∞", 2, lower_is_better=True),
    "speedup": FigureKind("speed-up, measured, ×", 2),
    "macs_speedup": FigureKind("MACs speed-up, counted, ×", 2, counted=True),
    "latency_ms": FigureKind("latency, ms", 1, lower_is_better=True),
    "images_per_second": FigureKind("images per second", 2),
    "peak_memory_mb": FigureKind("peak memory, MB", 0, lower_is_better=True, counted=True),
    "energy_j": FigureKind("energy of an image, J", 1, lower_is_better=True),
    "loop_ms": FigureKind("denoising loop, ms", 1, lower_is_better=True),
    "loop_speedup": FigureKind("speed-up of the denoising loop, ×", 2),
}

#: What is shown of the images, objectives or not.
IMAGE_FIGURES = ("fid", "fid_infinity", *QUALITIES[1:])

#: PSNR of two equal images, in dB (`dipgo_core.evaluation.paired` caps it there).
MAX_PSNR = 100.0

#: No figure is shown with more decimals, however narrow its interval.
MOST_DECIMALS = 6
#: Significant digits of an estimate that has no interval.
FEW_DIGITS = 2


def label_of(figure: str, scorer: str | None = None) -> str:
    """Return the name of a figure with the network behind it, such as ``FID (tiny-features)``."""
    label = FIGURES[figure].label
    return label if scorer is None else f"{label} ({scorer})"


def tracking_name(figure: str, scorer: str | None, prefix: str = "", end: str = "") -> str:
    """Return what a tracker calls a figure, such as ``clip_low/tiny-clip``.

    Only letters, digits and ``_-./ :`` pass MLflow, and no name may read as a path upwards.
    """
    name = f"{prefix}{figure}{end}"
    if scorer is None:
        return name
    parts = re.sub(r"[^\w\-./ :]", "-", scorer, flags=re.ASCII).split("/")
    return "/".join([name, *(part for part in parts if part.strip("."))])


def larger_is_better(figure: str, value: float) -> float:
    """Return `value`, negated where lower is better."""
    return -value if FIGURES[figure].lower_is_better else value


def wants_log(figure: str, values: Sequence[float]) -> bool:
    """Whether an axis of these values is better read in logarithms: some three decades of FIDs."""
    least, most = min(values), max(values)
    return FIGURES[figure].lower_is_better and most / 1000 < least < most / 12


def decimals_of(half_width: float) -> int:
    """Return after how many decimals a value with this uncertainty ends; negative: tens, hundreds.

    The half-width keeps two significant digits where they read 10 to 35, else one, so that rounding
    moves a value by 1 % to 14 % of it (Particle Data Group, Review of Particle Physics,
    introduction, section 5.3). Most digits shown: `MOST_DECIMALS`.
    """
    power = math.floor(math.log10(half_width))
    kept = 2 if half_width / 10.0**power < 3.55 else 1
    return min(MOST_DECIMALS, kept - 1 - power)


def figure_text(
    figure: str,
    value: float | None,
    low: float | None = None,
    high: float | None = None,
    *,
    n: int | None = None,
    signed: bool = False,
) -> str:
    """Format a figure with its 95 % interval, such as ``1.42 [1.38, 1.47]``; empty for None.

    No more digits than the interval supports (`decimals_of` half its width). An estimate without an
    interval has `FEW_DIGITS` significant digits and its n; a counted figure, or one whose interval
    has no width, the decimals of its kind.
    signed: a rounded zero keeps the sign of the value, so that it shows which side it is on.
    """
    if value is None:
        return ""
    exact = FIGURES[figure].decimals
    if FIGURES[figure].counted or (low is not None and low == high):
        return "0" if signed and value == 0 else _written(value, exact, signed)
    if low is None or high is None:
        size = math.floor(math.log10(abs(value))) if value else 0
        known = "" if n is None else f" (n={n})"
        return _written(value, min(MOST_DECIMALS, FEW_DIGITS - 1 - size), signed) + known
    decimals = decimals_of((high - low) / 2)
    parts = [_written(part, decimals, signed) for part in (value, low, high)]
    return "{} [{}, {}]".format(*parts)


def ratio_text(value: float, low: float | None, high: float | None) -> str:
    """Format the ratio of two speeds with its interval, such as ``1.08 [1.03, 1.13]``."""
    return figure_text("speedup", value, low, high)


def _written(value: float, decimals: int, signed: bool) -> str:
    rounded = round(value, decimals)
    if signed:
        return f"{rounded:+.{max(0, decimals)}f}"
    return f"{rounded + 0.0:.{max(0, decimals)}f}"  # never -0.0
