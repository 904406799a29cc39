"""Shards: what some images of an evaluation came to, and how parts become one. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.metrics import PER_IMAGE
from dipgo_core.evaluation.protocol import Protocol

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What images [start, stop) came to.

    scores: of the per-image metrics that the protocol measures, each (n,) float64.
    features: by role, each (n, d) float32. samples: those of `sample_indices`
    that fall into this shard, uint8 (k, 3, H, W). forwards: denoiser forwards spent.
    """

    start: int
    stop: int
    scores: Mapping[str, Array]
    features: Mapping[str, Array]
    samples: Array
    forwards: int

    def to_tensors(self) -> dict[str, Array]:
        """Return the shard as named arrays, ready for safetensors."""
        facts = np.array([self.start, self.stop, self.forwards], dtype=np.int64)
        features = {f"features.{role}": rows for role, rows in self.features.items()}
        return {"facts": facts, "samples": self.samples, **features, **self.scores}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Array]) -> ShardResult:
        """Return the shard that `to_tensors` wrote.

        Raises:
            EvaluationError: arrays are missing.
        """
        try:
            start, stop, forwards = (int(value) for value in tensors["facts"])
            scores = {name: tensors[name] for name in PER_IMAGE if name in tensors}
            features = {
                name.removeprefix("features."): rows
                for name, rows in tensors.items()
                if name.startswith("features.")
            }
            samples = tensors["samples"]
        except (KeyError, ValueError) as error:
            raise EvaluationError(f"not a shard of an evaluation: {error!r}") from error
        return cls(start, stop, scores, features, samples, forwards)


def cut(images: range, size: int, at: Sequence[int] = ()) -> tuple[range, ...]:
    """Return shards of images, in order: cut at every `size`-th image of the run, and at `at`.

    Cuts do not depend on where the images end, so that runs of other lengths share their shards.
    """
    inner = {*range(0, images.stop, size), *at}
    ends = sorted({images.start, *(c for c in inner if c in images), images.stop})
    return tuple(range(start, stop) for start, stop in pairwise(ends))


def first_of(shard: ShardResult, protocol: Protocol) -> ShardResult:
    """Return what a protocol asks of a shard that may have more images, metrics and features."""
    count = min(shard.stop, protocol.images) - shard.start
    metrics, roles = protocol.metrics, protocol.scorers.keys()
    return ShardResult(
        start=shard.start,
        stop=shard.start + count,
        scores={name: rows[:count] for name, rows in shard.scores.items() if name in metrics},
        features={role: rows[:count] for role, rows in shard.features.items() if role in roles},
        samples=shard.samples[:count],
        forwards=shard.forwards * count // (shard.stop - shard.start),
    )


def merge_shards(shards: Iterable[ShardResult], protocol: Protocol) -> ShardResult:
    """Return all shards of a protocol as one (see `joined`)."""
    return joined(shards, range(protocol.images))


def joined(parts: Iterable[ShardResult], images: range) -> ShardResult:
    """Return parts, in any order, as one; each is let go once it is copied to its place.

    Raises:
        EvaluationError: images are missing or there twice, or parts measured different things.
    """
    scores: dict[str, Array] = {}
    features: dict[str, Array] = {}
    samples: dict[int, Array] = {}
    counts = np.zeros(len(images), dtype=np.int64)
    forwards = 0
    for part in parts:
        rows = _rows(part, images)
        _fill(scores, part.scores, rows, counts)
        _fill(features, part.features, rows, counts)
        samples[part.start] = part.samples
        counts[rows] += 1
        forwards += part.forwards
    _check_once(counts, images)
    pictures = np.concatenate([samples[start] for start in sorted(samples)])
    return ShardResult(images.start, images.stop, scores, features, pictures, forwards)


def _rows(part: ShardResult, images: range) -> slice:
    if part.start < images.start or part.stop > images.stop:
        raise EvaluationError(
            f"images {part.start} to {part.stop - 1} are there, asked for are {images.start} to "
            f"{images.stop - 1}: run the sweep again"
        )
    return slice(part.start - images.start, part.stop - images.start)


def _fill(whole: dict[str, Array], part: Mapping[str, Array], rows: slice, counts: Array) -> None:
    """Copy arrays of a part to their rows; room is made by the first part."""
    if not counts.any():
        for name, values in part.items():
            whole[name] = np.empty((len(counts), *values.shape[1:]), values.dtype)
    if whole.keys() != part.keys():
        raise EvaluationError(
            f"some images have {', '.join(whole) or 'no scores'}, others "
            f"{', '.join(part) or 'no scores'}: run the sweep again"
        )
    for name, values in part.items():
        whole[name][rows] = values


def _check_once(counts: Array, images: range) -> None:
    for wrong, fault in ((counts == 0, "missing"), (counts > 1, "there twice")):
        if wrong.any():
            found = np.flatnonzero(wrong) + images.start
            raise EvaluationError(
                f"images {found.min()} to {found.max()} are {fault}: run the sweep again"
            )
