"""The images of the dense run, as its shards have kept them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator

import safetensors.numpy
import torch
from torch import Tensor

from dipgo_core.evaluation.generate import GeneratedBatch
from orchestrator.records import Record
from orchestrator.task.work import Work, shard_records

LATENTS_FILE = "latents.safetensors"


def image_file(first: int) -> str:
    """Name the artifact that holds the images from `first` on."""
    return f"images-{first:06d}.safetensors"


class DenseImages:
    """The images of the dense run that a task builds on, read one artifact at a time.

    There may be more of them than the task asks for.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        self._places: list[tuple[int, str, Record]] = []
        for record in shard_records(work.store, work.reference.outputs["shards"]):
            names = sorted(name for name in record.artifacts if name.startswith("images-"))
            self._places += [(_first_of(name), name, record) for name in names]
        self._read: tuple[str, Tensor] = ("", torch.empty(0))

    def __call__(self, start: int, stop: int) -> Tensor:
        """Return the images [start, stop), uint8.  # (n, 3, H, W)"""
        parts = []
        while start < stop:
            first, name, record = self._places[self._place(start)]
            part = self._artifact(name, record)[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def batches(self, images: range, batch_size: int) -> Iterator[GeneratedBatch]:
        """Yield images as the dense model made them, on the task's device."""
        for start in range(images.start, images.stop, batch_size):
            pixels = self(start, min(start + batch_size, images.stop)).to(self._work.device)
            yield GeneratedBatch(start, pixels, torch.empty(0), forwards=0)

    def _place(self, image: int) -> int:
        return bisect_right(self._places, image, key=lambda place: place[0]) - 1

    def _artifact(self, name: str, record: Record) -> Tensor:
        if self._read[0] != name:
            self._read = ("", torch.empty(0))  # never two of them in memory
            data = self._work.store.get_artifact(record, name)
            self._read = (name, torch.from_numpy(safetensors.numpy.load(data)["images"]))
        return self._read[1]


def _first_of(name: str) -> int:
    return int(name.split(".")[0].removeprefix("images-"))
