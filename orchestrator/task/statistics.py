"""Features of the reference images by one network, computed once for all evaluations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor

from dipgo_core.errors import TaskError
from dipgo_core.evaluation.fid import read_images
from dipgo_core.evaluation.overlap import overlapped
from dipgo_core.evaluation.reference import folder_id, image_files
from dipgo_core.evaluation.scorers import Scorer
from orchestrator.facts import reference_path
from orchestrator.gains import FEATURES_FILE
from orchestrator.task.dense import DenseImages
from orchestrator.task.scorers import loaded_scorer
from orchestrator.task.work import Outcome, Work, packed


def run_statistics(work: Work) -> Outcome:
    """Keep the features of the dense images, or of a folder of real ones.

    Raises:
        TaskError: the network or the folder is not the one that was planned with.
    """
    inputs = work.task.inputs
    role, planned = inputs["role"], Scorer.from_json(inputs["scorer"])
    extractor: Any = loaded_scorer(role, work.task.options["scorer"], work.device)
    if extractor.scorer != planned:
        raise TaskError(
            f"{work.task.label} was planned with {planned}, this worker has {extractor.scorer}: "
            "run the sweep again"
        )
    images = _dense_images(work) if inputs["images"] == "dense" else _folder_images(work)
    features = np.concatenate(list(overlapped(images, extractor)))
    outputs = {"n_images": len(features), "feature_dim": features.shape[1]}
    return Outcome(outputs, work.put(FEATURES_FILE, packed({role: features})))


def _dense_images(work: Work) -> Iterable[Tensor]:
    wanted = range(work.protocol.images)
    return (batch.images for batch in DenseImages(work).batches(wanted, work.batch_size))


def _folder_images(work: Work) -> Iterable[Tensor]:
    """Return the images of the folder, one a batch, which is found to be the one planned with."""
    folder, planned = reference_path(work.task.options["reference"]), work.task.inputs["images"]
    if folder_id(folder) != planned:
        raise TaskError(
            f"the images in {folder} changed since the sweep was planned, or this worker has "
            "others there: run the sweep again"
        )
    return read_images(image_files(folder))
