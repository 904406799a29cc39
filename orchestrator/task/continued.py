"""What is known of an evaluation's first images from another rung of its race."""

from __future__ import annotations

import logging

import safetensors.numpy

from dipgo_core.errors import StoreError
from dipgo_core.evaluation.evaluate import sample_indices
from dipgo_core.evaluation.metrics import FEATURE_ROLES
from dipgo_core.evaluation.shards import ShardResult
from orchestrator.gains import FEATURES_FILE, PER_IMAGE_FILE
from orchestrator.records import Record
from orchestrator.task.work import Arrays, Work

logger = logging.getLogger(__name__)


def continued(work: Work) -> ShardResult | None:
    """Return the images that the evaluation named by the option `continues` has scored.

    It has the same gates, items, seed and scorers, and another number of images: image i is the
    same in both. Those beyond this protocol are left out. None without that option, or where that
    evaluation had no use for features that this one needs.

    Raises:
        StoreError: the evaluation is gone.
    """
    key = work.task.options.get("continues")
    if key is None:
        return None
    record = work.store.get_record(key)
    if record is None:
        raise StoreError(
            f"{work.task.label} goes on from the evaluation {key[:12]}, which is gone from "
            f"{work.store.url}; run the sweep again"
        )
    wanted, whole = work.protocol, int(record.outputs["n_images"])
    count = min(whole, wanted.images)
    scores, features = (_read(work, record, name) for name in (PER_IMAGE_FILE, FEATURES_FILE))
    if any(role not in features for role in FEATURE_ROLES if role in wanted.scorers):
        logger.info("%s scores all its images: its lower rung had no features", work.task.label)
        return None
    samples = _read(work, record, "samples.safetensors")["images"]
    return ShardResult(
        start=0,
        stop=count,
        scores={name: rows[:count] for name, rows in scores.items() if name in wanted.metrics},
        features={role: rows[:count] for role, rows in features.items() if role in wanted.scorers},
        samples=samples[: len(sample_indices(count))],
        forwards=int(record.outputs["forwards"]) * count // whole,
    )


def _read(work: Work, record: Record, name: str) -> Arrays:
    """Return the arrays of an artifact; none where the record has no such file."""
    if name not in record.artifacts:
        return {}
    arrays: Arrays = safetensors.numpy.load(work.store.get_artifact(record, name))
    return arrays
