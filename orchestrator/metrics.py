"""The figures of a point: names, units, directions, decimals. Literal facts, nothing computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """How one figure is written and read. label: with unit; lower_is_better: its direction."""

    label: str
    decimals: int
    lower_is_better: bool = False

    @property
    def axis(self) -> str:
        """Return the label with the direction of better."""
        return f"{self.label} ({'lower' if self.lower_is_better else 'higher'} is better)"


FIGURES: Mapping[str, Figure] = {
    "fid": Figure("FID", 2, lower_is_better=True),
    "kid": Figure("KID", 4, lower_is_better=True),
    "clip": Figure("CLIP score", 2),
    "psnr": Figure("PSNR to dense, dB", 2),
    "ssim": Figure("SSIM to dense", 3),
    "speedup": Figure("speed-up, measured, ×", 2),
    "macs_speedup": Figure("MACs speed-up, counted, ×", 2),
    "latency_ms": Figure("latency, ms", 1, lower_is_better=True),
}

#: PSNR of two equal images, in dB (`dipgo_core.evaluation.paired` caps it there).
MAX_PSNR = 100.0

QUALITIES = ("fid", "kid", "clip", "psnr", "ssim")
PER_IMAGE = ("clip", "psnr", "ssim")


def larger_is_better(figure: str, value: float) -> float:
    """Return `value`, negated where lower is better."""
    return -value if FIGURES[figure].lower_is_better else value


def wants_log(figure: str, values: Sequence[float]) -> bool:
    """Whether an axis of these values is better read in logarithms: some three decades of FIDs."""
    least, most = min(values), max(values)
    return FIGURES[figure].lower_is_better and most / 1000 < least < most / 12


def number(figure: str, value: float | None, *, signed: bool = False) -> str:
    """Format one value of a figure; empty for None."""
    if value is None:
        return ""
    return f"{value:{'+' if signed else ''}.{FIGURES[figure].decimals}f}"
