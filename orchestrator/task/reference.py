"""The dense model: its blocks, its images, and its final latents on the calibration split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import torch
from torch import Tensor

from dipgo_core.binding import subnet_of
from dipgo_core.evaluation.evaluate import generate_images
from dipgo_core.evaluation.generate import GeneratedBatch
from dipgo_core.evaluation.shards import shards_of
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import block_graph
from dipgo_core.sampling import set_sampler
from orchestrator.task.work import Arrays, Outcome, Work, packed, put_shard, stored_shard

#: Bytes of images in one artifact, at most (an image larger than that has one for itself).
CHUNK_BYTES = 32 * 2**20


def run_reference(work: Work) -> Outcome:
    """Find the blocks; make the dense images, and on the calibration split keep their latents."""
    model, protocol = work.model, work.protocol
    graphs = {name: block_graph(model, name) for name in model.family.granularities}
    graph = next(iter(graphs.values()))
    artifacts: dict[str, str] = {}
    latents, forwards = [], 0
    for shard in shards_of(protocol, work.shard_size):
        made = _made(work, shard)
        artifacts |= {
            image_file(int(first)): digest.tobytes().hex()
            for first, digest in zip(made["firsts"], made["digests"], strict=True)
        }
        latents += [made["latents"]] if "latents" in made else []
        forwards += int(made["facts"][2])
    if protocol.split == "calibration":
        data = packed({"latents": np.concatenate(latents)})
        artifacts |= work.put("latents.safetensors", data)
    calls = len(set_sampler(model, work.sampler))
    dense = subnet_of(model, graph, work.sampler, GateTable.all_keep(calls, graph.num_blocks))
    outputs = {
        "graphs": {name: one.to_json() for name, one in graphs.items()},
        "timesteps": list(dense.sampler["timesteps"]),
        "subnet_model": dict(dense.model),
        "subnet_sampler": dict(dense.sampler),
        "n_images": protocol.images,
        "batch_size": work.batch_size,
        "forwards": forwards,
    }
    return Outcome(outputs, artifacts)


def image_file(first: int) -> str:
    """Name the artifact that holds the images from `first` on."""
    return f"images-{first:06d}.safetensors"


class DenseImages:
    """The images of the dense run, read from the reference's artifacts, one of them at a time.

    There may be more of them than the protocol of the evaluation asks for.
    """

    def __init__(self, work: Work) -> None:
        self._work = work
        names = [name for name in work.reference.artifacts if name.startswith("images-")]
        self._firsts = {int(name.split(".")[0].removeprefix("images-")): name for name in names}
        self._read: tuple[str, Tensor] = ("", torch.empty(0))

    def __call__(self, start: int, stop: int) -> Tensor:
        """Return the images [start, stop), uint8.  # (n, 3, H, W)"""
        parts = []
        while start < stop:
            first = max(known for known in self._firsts if known <= start)
            part = self._artifact(self._firsts[first])[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def batches(self, images: range, batch_size: int) -> Iterator[GeneratedBatch]:
        """Yield images as the dense model made them, on the task's device."""
        for start in range(images.start, images.stop, batch_size):
            pixels = self(start, min(start + batch_size, images.stop)).to(self._work.device)
            yield GeneratedBatch(start, pixels, torch.empty(0), forwards=0)

    def _artifact(self, name: str) -> Tensor:
        if self._read[0] != name:
            self._read = ("", torch.empty(0))  # never two of them in memory
            data = self._work.store.get_artifact(self._work.reference, name)
            self._read = (name, torch.from_numpy(safetensors.numpy.load(data)["images"]))
        return self._read[1]


def _made(work: Work, shard: range) -> Arrays:
    """Make a shard's images unless an interrupted run has; return what `_make` says of them."""
    made = stored_shard(work, shard)
    if made is None:
        made = _make(work, shard)
        put_shard(work, shard.start, made)
    work.report({"images": shard.stop, "of": work.protocol.images})
    return made


def _make(work: Work, shard: range) -> Arrays:
    """Put a shard's images into the store, a bounded number of bytes at a time.

    Returns the first image and the digest of each artifact, forwards, and on the calibration split
    the final latents; never the images.
    """
    forwards, keep_latents = 0, work.protocol.split == "calibration"
    latents: list[npt.NDArray[np.float32]] = []

    def pixels() -> Iterator[Tensor]:
        nonlocal forwards
        for batch in generate_images(
            work.model,
            work.protocol,
            work.items,
            shard,
            sampler=work.sampler,
            batch_size=work.batch_size,
        ):
            forwards += batch.forwards
            if keep_latents:
                latents.append(batch.latents.float().cpu().numpy())
            yield batch.images

    firsts, digests, first = [], [], shard.start
    for images in in_chunks(pixels(), CHUNK_BYTES):
        (digest,) = work.put(image_file(first), packed({"images": images})).values()
        firsts.append(first)
        digests.append(np.frombuffer(bytes.fromhex(digest), dtype=np.uint8))
        first += len(images)
    made = {
        "facts": np.array([shard.start, shard.stop, forwards], dtype=np.int64),
        "firsts": np.array(firsts, dtype=np.int64),
        "digests": np.stack(digests),
    }
    return {**made, "latents": np.concatenate(latents)} if keep_latents else made


def in_chunks(batches: Iterable[Tensor], most_bytes: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the images of batches in arrays of at most so many bytes, in host memory."""
    held: list[Tensor] = []
    for batch in batches:
        held.extend(batch.cpu())
        size = max(1, most_bytes // held[0].numel())
        while len(held) >= size:
            yield torch.stack(held[:size]).numpy()
            del held[:size]
    if held:
        yield torch.stack(held).numpy()
