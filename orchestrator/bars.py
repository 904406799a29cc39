"""Bars: which trivial baseline a SubNet has to beat, chosen on calibration prompts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from orchestrator.metrics import MAX_PSNR, larger_is_better
from orchestrator.records import Record

#: Figures that calibration evaluations have, as far as the sweep measures them.
CALIBRATION_METRICS = ("psnr", "ssim", "clip", "lpips", "dino", "image_reward")

#: What an image reads against itself.
_ITSELF = {"psnr": MAX_PSNR, "ssim": 1.0, "lpips": 0.0, "dino": 0.0}


def judged_by(metric: str) -> str:
    """Return the calibration figure that a choice for `metric` is based on: its own, or PSNR.

    FID, KID and CMMD need far more images than a calibration has: PSNR to dense stands in for them.
    """
    return metric if metric in CALIBRATION_METRICS else "psnr"


def score_for(metric: str, figures: Mapping[str, float | None]) -> float | None:
    """Return what a choice for `metric` goes by, larger = better, from calibration figures."""
    value = figures.get(judged_by(metric))
    return None if value is None else larger_is_better(judged_by(metric), value)


def calibration_figures(record: Record | None) -> dict[str, float | None]:
    """Return the figures choices are based on; a rival that is the dense run loses nothing."""
    if record is None:
        return {}
    measured: Mapping[str, Mapping[str, float | None]] = record.outputs["metrics"]
    wanted = record.inputs["protocol"]["metrics"]
    itself = {m: v for m, v in _ITSELF.items() if m in wanted and m not in measured}
    values = {name: measured.get(name, {}).get("value") for name in CALIBRATION_METRICS}
    known = {name: None if value is None else float(value) for name, value in values.items()}
    return {**known, **itself}


def best_of(scores: Sequence[float | None]) -> int | None:
    """Return the index of the best score; None while one is unknown, or if there are none."""
    known = [score for score in scores if score is not None]
    return known.index(max(known)) if known and len(known) == len(scores) else None
