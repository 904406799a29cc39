"""Gains: a point against others of the same protocol, image by image. numpy, no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from dipgo_core.errors import DipgoError
from dipgo_core.evaluation.fid_intervals import fid_replicates
from dipgo_core.evaluation.intervals import (
    Interval,
    Replicates,
    average_of,
    difference_of,
    interval_of,
    mean_replicates_of,
)
from dipgo_core.evaluation.metrics import METRICS, PER_IMAGE, Role
from dipgo_core.evaluation.mmd_intervals import kid_replicates
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.evaluation.reference import Reference, load_statistics, reference_of
from orchestrator.facts import reference_path
from orchestrator.metrics import FIGURES, figure_text
from orchestrator.records import Record, content_key
from orchestrator.store import Store

logger = logging.getLogger(__name__)

Verdict = Literal["beats", "ties", "loses", "unknown"]
Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

PER_IMAGE_FILE = "per_image.safetensors"
FEATURES_FILE = "features.safetensors"


@dataclass(frozen=True, kw_only=True)
class Gain:
    """How much better than a baseline, in the metric's own unit; positive = better.

    baseline_key: the baseline's point; several, joined by commas, where it is their mean.
    n: images compared, the first ones that all sides have.
    """

    value: float
    low: float | None
    high: float | None
    baseline_key: str
    n: int

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
        return figure_text(metric, self.value, self.low, self.high, signed=True)


class Comparisons:
    """Compares evaluations of one store by replicates, which are made once for each of them.

    All metrics go one way: every side is resampled with the same draws of prompts (FID: loses the
    same blocks of prompts), and what is subtracted are the replicates. Arrays are let go once their
    replicates are made; only the last reference is kept.

    records: those of the store; an evaluation is named by its key among them.
    """

    def __init__(self, store: Store, records: Mapping[str, Record]) -> None:
        self._store = store
        self._records = records
        self._replicates: dict[tuple[str, str, int], Replicates | None] = {}
        self._references: dict[tuple[str, Role], Reference | None] = {}
        self._dense: dict[str, Record | None] = {}

    def gain(self, metric: str, key: str, baselines: Mapping[str, str]) -> Gain | None:
        """Return the gain of an evaluation over the mean of others in a metric that all have.

        baselines: point key -> key of its evaluation.
        """
        sign = -1.0 if FIGURES[metric].lower_is_better else 1.0
        name, others = ",".join(sorted(baselines)), [baselines[k] for k in sorted(baselines)]
        found, n = self.difference(metric, key, *others), self._common_images(key, *others)
        if found is not None:
            low, high = sorted((sign * found.low + 0.0, sign * found.high + 0.0))  # never -0.0
            return Gain(value=sign * found.value + 0.0, low=low, high=high, baseline_key=name, n=n)
        value = self._plain_difference(metric, key, others)
        if value is None:
            return None
        return Gain(value=sign * value + 0.0, low=None, high=None, baseline_key=name, n=n)

    def difference(self, metric: str, key: str, *others: str) -> Interval | None:
        """Return an evaluation's figure minus the mean of others', None where no interval is known.

        Where they have different numbers of images, the first ones that all have are compared; FID,
        whose bias depends on their number, is not.
        """
        if all(other == key for other in others):
            return Interval(0.0, 0.0, 0.0) if self._figure(metric, key) is not None else None
        images = self._common_images(key, *others)
        sides = [self.replicates(metric, one, images) for one in (key, *others)]
        known = [side for side in sides if side is not None]
        if len(known) < len(sides):
            return None
        found = interval_of(difference_of(known[0], average_of(known[1:])))
        value = self._plain_difference(metric, key, others)
        return found if value is None else _moved(found, value)

    def replicates(self, metric: str, key: str, images: int | None = None) -> Replicates | None:
        """Return the replicates of a figure over the first `images` (default: all) images.

        None where arrays or reference are not at hand, or are too few for an interval.
        """
        record = self._records[key]
        count = self._images(key)
        first = count if images is None else images
        if metric == "fid" and first < count:
            return None
        where = (metric, key, first)
        if where not in self._replicates:
            made = self._resample(metric, record, first)
            self._replicates |= {(name, key, first): one for name, one in made.items()}
        return self._replicates.get(where)

    def _plain_difference(self, metric: str, key: str, others: Sequence[str]) -> float | None:
        """Return the difference of the figures themselves, None unless of equally many images."""
        if len({self._images(one) for one in (key, *others)}) > 1:
            return None
        values = [self._figure(metric, one) for one in (key, *others)]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return known[0] - sum(known[1:]) / len(others)

    def _resample(self, metric: str, record: Record, first: int) -> dict[str, Replicates | None]:
        """Return the replicates of every metric that the same file holds."""
        groups = prompt_of_image(record)[:first]
        role = METRICS[metric].role
        if METRICS[metric].per_image:
            scores = self._read(record, PER_IMAGE_FILE)
            return {
                name: mean_replicates_of(scores[name][:first], groups)
                for name in PER_IMAGE
                if name in scores
            }
        rows = None if role is None else self._features(record, role)
        reference = None if role is None or rows is None else self._reference(record, role)
        if rows is None or reference is None:
            return {metric: None}
        return {
            name: resample(rows[:first], reference, groups)
            for name, resample in DISTRIBUTIONS.items()
            if METRICS[name].role == role and self._figure(name, record.key) is not None
        }

    def _features(self, record: Record, role: Role) -> Array | None:
        return self._read(record, FEATURES_FILE).get(role)

    def _reference(self, record: Record, role: Role) -> Reference | None:
        """Return what features are compared with; the one last used is kept."""
        protocol = Protocol.from_json(record.inputs["protocol"])
        if role not in protocol.scorers:
            return None
        dense = self._dense_run(record) if protocol.reference == "dense" else None
        where = (protocol.reference if dense is None else dense.key, role)
        if where not in self._references:
            self._references.clear()
            self._references[where] = self._load_reference(record, protocol, role, dense)
        return self._references[where]

    def _load_reference(
        self, record: Record, protocol: Protocol, role: Role, dense: Record | None
    ) -> Reference | None:
        scorer = protocol.scorers[role]
        if protocol.reference != "dense":
            return _statistics(record, protocol, role, self._store)
        rows = None if dense is None else self._features(dense, role)
        return None if rows is None else reference_of(rows, scorer)

    def _dense_run(self, record: Record) -> Record | None:
        """Return the evaluation of the dense model under the same protocol."""
        identity = _measured_how(record)
        if identity not in self._dense:
            self._dense |= {
                _measured_how(one): one for one in self._records.values() if _is_dense(one)
            }
            self._dense.setdefault(identity, None)
        return self._dense[identity]

    def _common_images(self, *keys: str) -> int:
        return min(self._images(key) for key in keys)

    def _images(self, key: str) -> int:
        return int(self._records[key].inputs["protocol"]["images"])

    def _figure(self, metric: str, key: str) -> float | None:
        metrics = self._records[key].outputs.get("metrics", {})
        value = metrics.get(metric, {}).get("value")
        return None if value is None else float(value)

    def _read(self, record: Record, name: str) -> Arrays:
        """Return the arrays of an artifact; none where the record has no such file."""
        if name not in record.artifacts:
            return {}
        return load(self._store.get_artifact(record, name))


def prompt_of_image(record: Record) -> npt.NDArray[np.int64]:
    """Return the index of each image's prompt.  # (n,)"""
    protocol = record.inputs["protocol"]
    return np.arange(int(protocol["images"]), dtype=np.int64) % int(protocol["num_items"])


def _fid(rows: Array, reference: Reference, groups: Array) -> Replicates | None:
    side = reference.features if reference.paired else (reference.mean, reference.covariance)
    assert side is not None
    return fid_replicates(rows, side, groups, paired=reference.paired)


def _kid(rows: Array, reference: Reference, groups: Array) -> Replicates | None:
    if reference.features is None:
        return None
    known = reference.features[: len(rows)] if reference.paired else reference.features
    return kid_replicates(rows, known, groups, paired=reference.paired)


#: How a metric of all images against all reference images is resampled.
DISTRIBUTIONS: Mapping[str, Callable[[Array, Reference, Array], Replicates | None]] = {
    "fid": _fid,
    "kid": _kid,
}


def _moved(found: Interval, value: float) -> Interval:
    """Return the interval around another estimate of the same difference."""
    shift = value - found.value
    return Interval(value, found.low + shift, found.high + shift)


def _is_dense(record: Record) -> bool:
    if record.kind != "evaluate":
        return False
    inputs = record.inputs
    whole = all(set(row) == {"1"} for row in inputs["keep"])
    return whole and inputs["sampler"] == inputs["protocol"]["sampler"]


def _measured_how(record: Record) -> str:
    """Return what evaluations share that are made from the same noise and scored alike."""
    return content_key({name: record.inputs[name] for name in ("model", "protocol")})


def _statistics(record: Record, protocol: Protocol, role: Role, store: Store) -> Reference | None:
    """Read the statistics the evaluation was compared with; None where they are not at hand."""
    try:
        path = reference_path(store.get_task(record.key).options["reference"])
        found = load_statistics(path, protocol.scorers[role])
    except (DipgoError, OSError, KeyError) as error:
        logger.debug("gains in FID and KID get no interval: %s", error)
        return None
    return found if found.id == protocol.reference else None
