"""Gains: a point against others of the same protocol, image by image. numpy, no torch."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from dipgo_core.errors import DipgoError
from dipgo_core.evaluation.intervals import (
    Interval,
    Replicates,
    bootstrap_difference,
    fid_difference,
    fid_replicates,
    kid_difference,
    kid_replicates,
    mean_replicates,
)
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.evaluation.reference import Reference, load_statistics, reference_of
from orchestrator.facts import reference_path
from orchestrator.metrics import FIGURES, PER_IMAGE, QUALITIES, number
from orchestrator.records import Record
from orchestrator.store import Store

logger = logging.getLogger(__name__)

Verdict = Literal["beats", "ties", "loses", "unknown"]
Arrays = Mapping[str, npt.NDArray[Any]]

PER_IMAGE_FILE = "per_image.safetensors"
FEATURES_FILE = "features.safetensors"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much better than a baseline, in the metric's own unit; positive = better.

    baseline_key: the baseline's point; several, joined by commas, where it is their mean.
    """

    value: float
    low: float | None
    high: float | None
    baseline_key: str

    @property
    def verdict(self) -> Verdict:
        """Say what the 95 % interval excludes; unknown where there is none."""
        if self.low is None or self.high is None:
            return "unknown"
        if self.low > 0:
            return "beats"
        return "loses" if self.high < 0 else "ties"

    def text(self, metric: str) -> str:
        """Format as ``+0.42 [+0.10, +0.71]``."""
        value = number(metric, self.value, signed=True)
        if self.low is None or self.high is None:
            return value
        low, high = (number(metric, end, signed=True) for end in (self.low, self.high))
        return f"{value} [{low}, {high}]"


class Comparisons:
    """Compares evaluations; arrays are read, and figures resampled, once per evaluation."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._arrays: dict[tuple[str, str], Arrays] = {}
        self._references: dict[str, Reference | None] = {}
        self._replicates: dict[tuple[str, str], Replicates | None] = {}
        self._gains: dict[tuple[str, ...], Mapping[str, Gain]] = {}

    def gains(
        self, record: Record, baselines: Mapping[str, Record], *, dense: Record | None
    ) -> Mapping[str, Gain]:
        """Return the gain of `record` over the mean of `baselines` in each metric all have.

        baselines: point key -> evaluate record. dense: evaluate record of the dense run, which FID
        and KID compare with under `reference: dense`.
        CLIP score, PSNR, SSIM and KID by bootstrap over prompts, FID by a jackknife over blocks of
        prompts; every side draws or loses the same prompts.
        """
        identity = (record.key, *sorted(f"{k}:{r.key}" for k, r in baselines.items()))
        if identity not in self._gains:
            name = ",".join(sorted(baselines))
            others = [baselines[key] for key in sorted(baselines)]
            found = {
                metric: self._gain(metric, record, others, dense, name) for metric in QUALITIES
            }
            self._gains[identity] = {metric: gain for metric, gain in found.items() if gain}
        return self._gains[identity]

    def _gain(
        self, metric: str, record: Record, others: Sequence[Record], dense: Record | None, name: str
    ) -> Gain | None:
        values = [_figure(other, metric) for other in (record, *others)]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        sign = -1.0 if FIGURES[metric].lower_is_better else 1.0
        value = sign * (known[0] - sum(known[1:]) / len(others)) + 0.0  # never -0.0
        interval = self._difference(metric, record, others, dense)
        if interval is None:
            return Gain(value=value, low=None, high=None, baseline_key=name)
        ends = sorted(sign * (end - interval.value) + 0.0 for end in (interval.low, interval.high))
        return Gain(value=value, low=value + ends[0], high=value + ends[1], baseline_key=name)

    def _difference(
        self, metric: str, record: Record, others: Sequence[Record], dense: Record | None
    ) -> Interval | None:
        """Return the interval of record minus the mean of others, before any change of sign."""
        if all(other.key == record.key for other in others):
            return Interval(0.0, 0.0, 0.0)
        if metric in PER_IMAGE:
            found = [self._read(side, PER_IMAGE_FILE).get(metric) for side in (record, *others)]
            scores = [array for array in found if array is not None]
            if len(scores) < len(found):
                return None
            theirs = np.mean(np.stack(scores[1:]), axis=0)
            return bootstrap_difference(scores[0], theirs, prompt_of_image(record))
        sides = [self._resampled(metric, side, dense) for side in (record, *others)]
        known = [side for side in sides if side is not None]
        if len(known) < len(sides):
            return None
        difference = fid_difference if metric == "fid" else kid_difference
        return difference(known[0], mean_replicates(known[1:]))

    def _resampled(self, metric: str, record: Record, dense: Record | None) -> Replicates | None:
        where = (metric, record.key)
        if where not in self._replicates:
            self._replicates[where] = self._resample(metric, record, dense)
        return self._replicates[where]

    def _resample(self, metric: str, record: Record, dense: Record | None) -> Replicates | None:
        reference = self._reference(record, dense)
        if reference is None:
            return None
        features = self._read(record, FEATURES_FILE).get("features")
        if features is None:
            return None
        groups = prompt_of_image(record)
        if metric == "kid":
            known = reference.features
            return None if known is None else kid_replicates(
                features, known, groups, paired=reference.paired
            )  # fmt: skip
        side = reference.features if reference.paired else (reference.mean, reference.covariance)
        assert side is not None
        return fid_replicates(features, side, groups, paired=reference.paired)

    def _reference(self, record: Record, dense: Record | None) -> Reference | None:
        protocol = Protocol.from_json(record.inputs["protocol"])
        scorer = protocol.scorers.get("features")
        if scorer is None:
            return None
        if protocol.reference == "dense":
            rows = None if dense is None else self._read(dense, FEATURES_FILE).get("features")
            return None if rows is None else reference_of(rows, scorer)
        if protocol.reference not in self._references:
            self._references[protocol.reference] = _statistics(record, protocol, self._store)
        return self._references[protocol.reference]

    def _read(self, record: Record, name: str) -> Arrays:
        """Return the arrays of an artifact; none where the record has no such file."""
        if name not in record.artifacts:
            return {}
        where = (record.key, name)
        if where not in self._arrays:
            self._arrays[where] = load(self._store.get_artifact(record, name))
        return self._arrays[where]


def prompt_of_image(record: Record) -> npt.NDArray[np.int64]:
    """Return the index of each image's prompt.  # (n,)"""
    protocol = record.inputs["protocol"]
    return np.arange(int(protocol["images"]), dtype=np.int64) % int(protocol["num_items"])


def _statistics(record: Record, protocol: Protocol, store: Store) -> Reference | None:
    """Read the statistics the evaluation was compared with; None where they are not at hand."""
    try:
        path = reference_path(store.get_task(record.key).options["reference"])
        found = load_statistics(path, protocol.scorers["features"])
    except (DipgoError, OSError, KeyError) as error:
        logger.debug("gains in FID and KID get no interval: %s", error)
        return None
    return found if found.id == protocol.reference else None


def _figure(record: Record, metric: str) -> float | None:
    value = record.outputs.get("metrics", {}).get(metric, {}).get("value")
    return None if value is None else float(value)
