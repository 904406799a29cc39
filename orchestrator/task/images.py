"""One shard: images of the dense run, which are kept, or of any gate table, which are scored.

A shard is made piece by piece; a finished piece is kept, so that an interrupted task goes on after
it, on whatever node.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dipgo_core.binding import model_facts, sampler_facts
from dipgo_core.evaluation.evaluate import evaluate_shards, generate_images, score_shards
from dipgo_core.evaluation.metrics import PAIRED
from dipgo_core.evaluation.shards import ShardResult, joined
from dipgo_core.pipelines import block_graph
from orchestrator.task.dense import LATENTS_FILE, DenseImages, image_file
from orchestrator.task.scorers import scorers_of
from orchestrator.task.work import Arrays, Outcome, Work, packed, put_piece, stored_piece

#: Bytes of images in one piece and in one artifact, at most (one image may be larger).
CHUNK_BYTES = 32 * 2**20
SHARD_FILE = "shard.safetensors"


def run_images(work: Work) -> Outcome:
    """Make the images of a shard; without gates they are those of the dense run itself."""
    return _scored(work) if "keep" in work.task.inputs else _dense(work)


def pieces_of(work: Work) -> tuple[range, ...]:
    """Return the parts of a shard that are kept one by one: whole batches of bounded size."""
    images, batch, protocol = work.images, work.batch_size, work.protocol
    fitting = CHUNK_BYTES // (3 * protocol.height * protocol.width)
    size = max(1, fitting // batch) * batch
    starts = range(images.start, images.stop, size)
    return tuple(range(start, min(start + size, images.stop)) for start in starts)


# scored -------------------------------------------------------------------------------------------


def _scored(work: Work) -> Outcome:
    whole = joined(_results(work), work.images)
    described = {} if work.is_dense else sampler_facts(work.model, work.sampler)
    outputs = {
        "forwards": whole.forwards,
        "n_images": len(work.images),
        "batch_size": work.batch_size,
        "subnet_sampler": described,
    }
    return Outcome(outputs, work.put(SHARD_FILE, packed(whole.to_tensors())))


def _results(work: Work) -> Iterator[ShardResult]:
    """Yield every piece; those of an interrupted run are not computed again."""
    missing = []
    for piece in pieces_of(work):
        stored = stored_piece(work, piece)
        if stored is None:
            missing.append(piece)
        else:
            yield ShardResult.from_tensors(stored)
    for result in _made_anew(work, missing):
        put_piece(work, result.start, result.to_tensors())
        _report(work, result.stop)
        yield result


def _made_anew(work: Work, pieces: Sequence[range]) -> Iterator[ShardResult]:
    if not pieces:
        return iter(())
    scorers = scorers_of(work)
    if work.is_dense:  # the reference has made them
        dense = DenseImages(work)
        batches = (batch for piece in pieces for batch in dense.batches(piece, work.batch_size))
        return score_shards(
            batches, pieces, work.protocol, work.items, scorers, None, device=work.device
        )
    return evaluate_shards(
        work.model,
        work.protocol,
        work.items,
        scorers,
        sampler=work.sampler,
        gates=None if work.gates.keep.all() else work.gates,
        graph=work.graph,
        dense=DenseImages(work) if set(PAIRED) & set(work.protocol.metrics) else None,
        shards=pieces,
        batch_size=work.batch_size,
    )


def _report(work: Work, stop: int) -> None:
    work.report({"images": stop - work.images.start, "of": len(work.images)})


# the dense run ------------------------------------------------------------------------------------


def _dense(work: Work) -> Outcome:
    """Keep the images, on the calibration split their latents; the first shard finds the blocks."""
    artifacts: dict[str, str] = {}
    latents, forwards = [], 0
    for piece in pieces_of(work):
        made = _kept(work, piece)
        artifacts |= dict(_files(made))
        latents += [made["latents"]] if "latents" in made else []
        forwards += int(made["facts"][2])
    if latents:
        artifacts |= work.put(LATENTS_FILE, packed({"latents": np.concatenate(latents)}))
    outputs = {
        "forwards": forwards,
        "n_images": len(work.images),
        "batch_size": work.batch_size,
        **(_described(work) if work.images.start == 0 else {}),
    }
    return Outcome(outputs, artifacts)


def _described(work: Work) -> dict[str, Any]:
    """Return the model's blocks, and what SubNets say of it and its sampler."""
    model = work.model
    graphs = {name: block_graph(model, name).to_json() for name in model.family.granularities}
    sampler = sampler_facts(model, work.sampler)
    return {
        "graphs": graphs,
        "timesteps": list(sampler["timesteps"]),
        "subnet_model": model_facts(model),
        "subnet_sampler": sampler,
    }


def _kept(work: Work, piece: range) -> Arrays:
    """Make a piece unless an interrupted run has; return what `_make` says of it."""
    made = stored_piece(work, piece)
    if made is None or not all(work.has(name, digest) for name, digest in _files(made)):
        made = _make(work, piece)
        put_piece(work, piece.start, made)
    _report(work, piece.stop)
    return made


def _files(made: Arrays) -> Iterator[tuple[str, str]]:
    """Yield name and digest of each artifact of a piece."""
    for first, digest in zip(made["firsts"], made["digests"], strict=True):
        yield image_file(int(first)), digest.tobytes().hex()


def _make(work: Work, piece: range) -> Arrays:
    """Put images into the store, a bounded number of bytes at a time.

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
            piece,
            sampler=work.sampler,
            batch_size=work.batch_size,
        ):
            forwards += batch.forwards
            if keep_latents:
                latents.append(batch.latents.float().cpu().numpy())
            yield batch.images

    firsts, digests, first = [], [], piece.start
    for images in in_chunks(pixels(), CHUNK_BYTES):
        (digest,) = work.put(image_file(first), packed({"images": images})).values()
        firsts.append(first)
        digests.append(np.frombuffer(bytes.fromhex(digest), dtype=np.uint8))
        first += len(images)
    made = {
        "facts": np.array([piece.start, piece.stop, forwards], dtype=np.int64),
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
