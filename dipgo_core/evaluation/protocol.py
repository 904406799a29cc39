"""Protocol: everything that decides a figure, as one frozen value with a hash. No torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dipgo_core.config import DType
from dipgo_core.errors import EvaluationError, nearest
from dipgo_core.evaluation.metrics import METRICS, Role, roles_of
from dipgo_core.evaluation.scorers import Scorer

Split = Literal["calibration", "test"]

SCHEMA_VERSION = 2
SPLITS = ("calibration", "test")


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """One way of measuring; figures of two protocols are never compared.

    items_sha256, num_items: the prompts or labels; image i shows item i % num_items.
    images: n. seed: all noise follows from it by `image_seed`.
    scorers: the network of each role that the metrics need, and of no other.
    reference: what FID, KID and CMMD compare with: "dense", "statistics:<sha256>" or
        "folder:<sha256>".
    sampler: settings of the dense model (noise scheduler, steps, guidance).
    kid_subset_size: images a KID subset draws, at most n / 2; 0 where KID is not measured.
    tile: side in pixels of the tiles that images are decoded in; None: decoded whole.

    Raises:
        EvaluationError: a field breaks its rule.
    """

    split: Split
    items_sha256: str
    num_items: int
    images: int
    seed: int
    height: int
    width: int
    sampler: Mapping[str, Any]
    dtype: DType
    scorers: Mapping[Role, Scorer] = field(default_factory=dict)
    reference: str = "dense"
    kid_subset_size: int = 0
    metrics: tuple[str, ...] = ()
    safety_checker: Literal[False] = False
    tile: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "metrics", tuple(self.metrics))
        object.__setattr__(self, "sampler", dict(self.sampler))
        object.__setattr__(self, "scorers", dict(self.scorers))
        _check_counts(self)
        _check_metrics(self)
        _check_reference(self)

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON; carried by every figure."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        fields = {"schema_version": SCHEMA_VERSION, **asdict(self), "metrics": list(self.metrics)}
        if self.tile is None:  # as protocols were before there were tiles
            del fields["tile"]
        return fields

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Protocol:
        """Build a protocol from `to_json`.

        Raises:
            EvaluationError: another schema version, or fields that are missing or unknown.
        """
        fields = dict(data)
        version = fields.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise EvaluationError(
                f"the protocol has schema_version {version!r}, this dipgo-sweep reads "
                f"{SCHEMA_VERSION}: run the sweep again"
            )
        try:
            scorers = {role: Scorer.from_json(one) for role, one in fields.pop("scorers").items()}
            return cls(**fields, scorers=scorers)
        except (AttributeError, KeyError, TypeError) as error:
            raise EvaluationError(f"not a protocol: {error}") from error

    def differences(self, other: Protocol) -> tuple[str, ...]:
        """Return one line a field that differs, "field: mine against theirs"; () if equal."""
        mine, theirs = _flat(self.to_json()), _flat(other.to_json())
        return tuple(
            f"{name}: {mine.get(name)!r} against {theirs.get(name)!r}"
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        )


def image_seed(seed: int, split: str, index: int) -> int:
    """Return the noise seed of image `index`, in [0, 2**63).

    It depends on nothing else: not on batch, shard or worker, nor on how many images there are.
    """
    digest = hashlib.sha256(f"dipgo.image\0{seed}\0{split}\0{index}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def largest_kid_subset(images: int) -> int:
    """Return torch-fidelity's subset size of 1,000, or n / 2 where that is less.

    Raises:
        EvaluationError: fewer than 4 images, of which no KID can be made.
    """
    if images < 4:
        raise EvaluationError(f"KID needs at least 4 images, got {images}: raise evaluate.images")
    return min(1000, images // 2)


def _check_counts(protocol: Protocol) -> None:
    if protocol.split not in SPLITS:
        raise EvaluationError(f"split must be calibration or test, got {protocol.split!r}")
    for name in ("num_items", "images", "height", "width"):
        if getattr(protocol, name) < 1:
            raise EvaluationError(f"{name} must be at least 1, got {getattr(protocol, name)}")
    if protocol.safety_checker is not False:
        raise EvaluationError("safety_checker must be False: it blackens images")


def _check_metrics(protocol: Protocol) -> None:
    for metric in protocol.metrics:
        if metric not in METRICS:
            raise EvaluationError(
                f"no image metric is called {metric!r}; known are {', '.join(METRICS)}."
                f"{nearest(metric, tuple(METRICS))}"
            )
    needed = roles_of(protocol.metrics)
    if set(needed) != set(protocol.scorers):
        raise EvaluationError(
            f"the metrics {', '.join(protocol.metrics) or 'none'} need scorers for "
            f"{', '.join(needed) or 'nothing'}, the protocol has them for "
            f"{', '.join(protocol.scorers) or 'nothing'}"
        )
    for metric in ("fid", "cmmd"):
        if metric in protocol.metrics and protocol.images < 2:
            raise EvaluationError(f"{metric} needs at least 2 images, got {protocol.images}")
    largest = largest_kid_subset(protocol.images) if "kid" in protocol.metrics else 0
    if "kid" in protocol.metrics and not 2 <= protocol.kid_subset_size <= protocol.images // 2:
        raise EvaluationError(
            f"kid_subset_size must be at least 2 and at most half of the {protocol.images} "
            f"images, got {protocol.kid_subset_size}: {largest} fits"
        )


def _check_reference(protocol: Protocol) -> None:
    kind, _, digest = protocol.reference.partition(":")
    if protocol.reference != "dense" and not (kind in ("statistics", "folder") and digest):
        raise EvaluationError(
            "reference must be 'dense', 'statistics:<sha256>' or 'folder:<sha256>', got "
            f"{protocol.reference!r}"
        )


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
