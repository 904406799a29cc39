"""An image model of transformers as a scorer reads it: whole, in float32, from safetensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoImageProcessor

from dipgo_core.errors import EvaluationError, ModelFilesError
from dipgo_core.evaluation.scorers import network_folder
from dipgo_core.hub import resolve_commit, split_id
from dipgo_core.model_files import hub_network


def fetched_network(name: str) -> tuple[str, Path]:
    """Return a network's name, with its commit if it is from the hub, and the folder it lies in.

    Raises:
        ModelFilesError: it is not here, and the hub cannot be reached or does not have it.
    """
    folder = network_folder(name)
    if folder is not None:
        return name, folder
    hub_id, revision = split_id(name)
    commit = resolve_commit(hub_id, revision)
    return f"{hub_id}@{commit}", hub_network(hub_id, commit)


def load_vision_model(folder: Path, model_class: Any, *, config: Any = None) -> tuple[Any, Any]:
    """Return a model without gradients, on the CPU, and its image processor.

    Raises:
        ModelFilesError: as of `load_whole`.
    """
    return load_whole(folder, model_class, AutoImageProcessor, config=config)


def load_whole(
    folder: Path, model_class: Any, processor_class: Any, *, config: Any = None
) -> tuple[Any, Any]:
    """Return a model without gradients, on the CPU, and its processor.

    Raises:
        ModelFilesError: files are missing or torn, or of another kind of model: no weight is ever
            left at random.
    """
    try:
        with unreported():
            model, info = model_class.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
            )
        processor = processor_class.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelFilesError(
            f"the network in {folder} cannot be loaded: {error}\nIt needs config.json, "
            "model.safetensors and preprocessor_config.json, one that reads prompts its "
            "tokenizer's files too"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelFilesError(
            f"the network in {folder} lacks {len(missing)} weights of {model_class.__name__} "
            f"({missing[0]}): is it another kind of model?"
        )
    model.eval().requires_grad_(False)
    return model, processor


@contextmanager
def unreported() -> Iterator[None]:
    """Keep transformers from listing what a file holds besides; what it lacks is checked here."""
    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(_is_no_report)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def check_images(images: Tensor, scorer: str) -> None:
    """Check that a network is given images.

    Raises:
        EvaluationError: not uint8 (n, 3, H, W).
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise EvaluationError(
            f"{scorer} needs uint8 images (n, 3, H, W), got {images.dtype} {tuple(images.shape)}"
        )


def check_pair(images: Tensor, dense: Tensor, scorer: str) -> None:
    """Check that a network is given images and as many dense ones.

    Raises:
        EvaluationError: not uint8 images of one shape.
    """
    check_images(images, scorer)
    check_images(dense, scorer)
    if images.shape != dense.shape:
        raise EvaluationError(
            f"{scorer} compares images of one shape, got {tuple(images.shape)} and "
            f"{tuple(dense.shape)}: were the dense images made under the same protocol?"
        )


def check_finite(values: Tensor, scorer: str) -> Tensor:
    """Return the values.

    Raises:
        EvaluationError: some are not finite.
    """
    if not bool(torch.isfinite(values).all()):
        raise EvaluationError(f"{scorer} returned values that are not finite")
    return values
