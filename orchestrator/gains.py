"""Gains: a point against others of the same protocol, image by image. numpy, no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dipgo_core.errors import DipgoError, StoreError
from dipgo_core.evaluation.cmmd_distance import cmmd_replicates
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
from orchestrator.records import Record
from orchestrator.store import Store

logger = logging.getLogger(__name__)

Verdict = Literal["beats", "ties", "loses", "unknown"]
Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

Method = Literal["bootstrap", "jackknife"]
#: Metric, evaluation, number of its first images, whether prompts (or images) are drawn.
Where = tuple[str, str, int, bool]

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
        return figure_text(metric, self.value, self.low, self.high, n=self.n, signed=True)


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
        self._replicates: dict[Where, Replicates | None] = {}
        self._references: dict[tuple[str, int, Role], Reference | None] = {}
        self._unread: dict[Role | None, str] = {}

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
        return found if value is None else containing(found, value)

    def replicates(
        self, metric: str, key: str, images: int | None = None, *, by_prompt: bool = True
    ) -> Replicates | None:
        """Return the replicates of a figure over the first `images` (default: all) images.

        by_prompt: whether prompts are drawn, as for every claim about other prompts, or images.
        None where arrays or reference are not at hand, or are too few for an interval.
        """
        record = self._records[key]
        count = self._images(key)
        first = count if images is None else images
        if metric == "fid" and (first < count or not self._has_interval(metric, key)):
            return None
        where = (metric, key, first, by_prompt)
        if where not in self._replicates:
            kept = self._kept(where)
            groups = prompt_of_image(record)[:first] if by_prompt else np.arange(first)
            made = self._resample(metric, record, groups) if kept is None else {metric: kept}
            self._replicates[where] = None
            self._replicates |= {(name, key, first, by_prompt): one for name, one in made.items()}
            if kept is None:
                self._keep(where)
        return self._replicates[where]

    def why_unknown(self, metric: str) -> str:
        """Say why replicates of a metric that was measured are None."""
        unread = self._unread.get(METRICS[metric].role)
        return unread or "the scores or features of its images are gone, or of too few images"

    def _kept(self, where: Where) -> Replicates | None:
        """Return replicates that an earlier command has kept in the store."""
        data = self._store.get_derived(where[1], _derived_name(where))
        if data is None:
            return None
        try:
            arrays = load(data)
            groups, n, jackknife = (int(value) for value in arrays["facts"])
        except (SafetensorError, KeyError, ValueError) as error:
            logger.warning("replicates of %s are damaged and made again: %s", where[1][:12], error)
            return None
        method: Method = "jackknife" if jackknife else "bootstrap"
        return Replicates(arrays["values"], groups, n, method)

    def _keep(self, where: Where) -> None:
        """Keep what takes seconds to minutes to make; a store that can only be read stays as is."""
        one = self._replicates[where]
        if one is None or METRICS[where[0]].per_image:
            return
        facts = np.array([one.groups, one.n, one.method == "jackknife"], dtype=np.int64)
        data = save({"values": np.ascontiguousarray(one.values), "facts": facts})
        try:
            self._store.put_derived(where[1], _derived_name(where), data)
        except StoreError as error:
            logger.debug("replicates of %s are not kept: %s", where[1][:12], error)

    def _plain_difference(self, metric: str, key: str, others: Sequence[str]) -> float | None:
        """Return the difference of the figures themselves, None unless of equally many images."""
        if len({self._images(one) for one in (key, *others)}) > 1:
            return None
        values = [self._figure(metric, one) for one in (key, *others)]
        known = [value for value in values if value is not None]
        if len(known) < len(values):
            return None
        return known[0] - sum(known[1:]) / len(others)

    def _resample(
        self, metric: str, record: Record, groups: npt.NDArray[np.int64]
    ) -> dict[str, Replicates | None]:
        """Return replicates of the metric; of all per-image ones at once.  # groups (n,)"""
        first = len(groups)
        role = METRICS[metric].role
        if METRICS[metric].per_image:
            scores = self._read(record, PER_IMAGE_FILE)
            return {
                name: mean_replicates_of(scores[name][:first], groups)
                for name in PER_IMAGE
                if name in scores
            }
        if role is None or self._figure(metric, record.key) is None:
            return {}
        rows = self._features(record, role)
        reference = None if rows is None else self._reference(record, role)
        if rows is None or reference is None:
            return {}
        return {metric: DISTRIBUTIONS[metric](rows[:first], reference, groups)}

    def _features(self, record: Record, role: Role) -> Array | None:
        return self._read(record, FEATURES_FILE).get(role)

    def _reference(self, record: Record, role: Role) -> Reference | None:
        """Return what features are compared with; the one last used is kept."""
        protocol = Protocol.from_json(record.inputs["protocol"])
        if role not in protocol.scorers:
            return None
        made = record.outputs.get("statistics", {}).get(role, "")
        where = (made or protocol.reference, protocol.images, role)
        if where not in self._references:
            self._references.clear()
            self._references[where] = self._readable(record, protocol, role, made)
        return self._references[where]

    def _readable(
        self, record: Record, protocol: Protocol, role: Role, made: str
    ) -> Reference | None:
        """Read what an evaluation was compared with; None, and why, where it is not at hand."""
        try:
            return _load_reference(self._store, record, protocol, role, made)
        except (DipgoError, OSError, KeyError) as error:
            logger.debug("differences in distance to %s get no interval: %s", role, error)
            self._unread[role] = f"{type(error).__name__}: {error}"
            return None

    def _common_images(self, *keys: str) -> int:
        return min(self._images(key) for key in keys)

    def _images(self, key: str) -> int:
        return int(self._records[key].inputs["protocol"]["images"])

    def _has_interval(self, metric: str, key: str) -> bool:
        metrics = self._records[key].outputs.get("metrics", {})
        return metrics.get(metric, {}).get("low") is not None

    def _figure(self, metric: str, key: str) -> float | None:
        metrics = self._records[key].outputs.get("metrics", {})
        value = metrics.get(metric, {}).get("value")
        return None if value is None else float(value)

    def _read(self, record: Record, name: str) -> Arrays:
        """Return the arrays of an artifact; none where the record has no such file."""
        if name not in record.artifacts:
            return {}
        arrays: Arrays = load(self._store.get_artifact(record, name))
        return arrays


def _derived_name(where: Where) -> str:
    metric, _, first, by_prompt = where
    return f"replicates-{metric}-{first}-{'prompts' if by_prompt else 'images'}.safetensors"


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


def _cmmd(rows: Array, reference: Reference, groups: Array) -> Replicates | None:
    if reference.features is None:
        return None
    known = reference.features[: len(rows)] if reference.paired else reference.features
    return cmmd_replicates(rows, known, groups, paired=reference.paired)


#: How a metric of all images against all reference images is resampled.
DISTRIBUTIONS: Mapping[str, Callable[[Array, Reference, Array], Replicates | None]] = {
    "fid": _fid,
    "kid": _kid,
    "cmmd": _cmmd,
}


def containing(found: Interval, value: float) -> Interval:
    """Return the bounds of a difference, widened to contain that of the figures shown.

    Replicates bound the difference of the distributions; FID and KID as they are shown (those of
    torch-fidelity) also hold a bias of n images, which need not cancel.
    """
    return Interval(value, min(found.low, value), max(found.high, value))


def stored_reference(store: Store, key: str, protocol: Protocol, role: Role) -> Reference:
    """Return the reference made of the features that the statistics task `key` has left.

    Of the dense images those are taken that the protocol compares with, the first ones.

    Raises:
        StoreError: the features are gone.
    """
    record = store.get_record(key)
    if record is None:
        raise StoreError(
            f"the features of the reference images ({key[:12]}) are gone from {store.url}; run the "
            "sweep again"
        )
    rows = load(store.get_artifact(record, FEATURES_FILE))[role]
    dense = protocol.reference == "dense"
    return reference_of(
        rows[: protocol.images] if dense else rows,
        protocol.scorers[role],
        id=protocol.reference,
        paired=dense,
    )


def _load_reference(
    store: Store, record: Record, protocol: Protocol, role: Role, made: str
) -> Reference:
    if made:
        return stored_reference(store, made, protocol, role)
    path = reference_path(store.get_task(record.key).options["reference"])
    found = load_statistics(path, protocol.scorers[role])
    if found.id != protocol.reference:
        raise StoreError(
            f"the statistics {path} are {found.id}, but {record.key[:12]} was compared with "
            f"{protocol.reference}: put those back, or run the sweep again"
        )
    return found
