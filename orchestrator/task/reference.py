"""The dense model: its blocks, its images, and its final latents on the calibration split."""

from __future__ import annotations

from collections.abc import Iterator

import safetensors.torch
import torch
from torch import Tensor

from dipgo_core.evaluation.evaluate import evaluate_shards
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import (
    block_graph,
    encode,
    initial_latents,
    rollout,
    set_sampler,
    subnet_of,
)
from orchestrator.task.work import (
    Arrays,
    Outcome,
    Work,
    items_and_seeds,
    packed,
    put_shard,
    stored_shards,
)


def run_reference(work: Work) -> Outcome:
    """Find the blocks; make the dense images, and on the calibration split their final latents."""
    model, protocol = work.model, work.protocol
    graph = block_graph(model, work.task.inputs["granularity"])
    artifacts: dict[str, str] = {}
    forwards = 0
    for shard in _image_shards(work):
        data = packed({"images": shard["images"]})
        artifacts |= work.put(f"images-{int(shard['facts'][0]):06d}.safetensors", data)
        forwards += int(shard["facts"][2])
    if protocol.split == "calibration":
        latents = safetensors.torch.save({"latents": _final_latents(work)})
        artifacts |= work.put("latents.safetensors", latents)
    calls = len(set_sampler(model, work.sampler))
    dense = subnet_of(model, graph, work.sampler, GateTable.all_keep(calls, graph.num_blocks))
    outputs = {
        "graph": graph.to_json(),
        "timesteps": list(dense.sampler["timesteps"]),
        "subnet_model": dict(dense.model),
        "subnet_sampler": dict(dense.sampler),
        "n_images": protocol.images,
        "forwards": forwards,
    }
    return Outcome(outputs, artifacts)


def _image_shards(work: Work) -> Iterator[Arrays]:
    """Yield the dense images shard by shard; those of an interrupted run are not made again."""
    stored = stored_shards(work)
    yield from stored.values()
    fresh = evaluate_shards(
        work.model,
        work.protocol,
        work.items,
        {},
        sampler=work.sampler,
        shard_size=work.shard_size,
        batch_size=work.batch_size,
        done=stored.keys(),
        keep_images=True,
    )
    for shard in fresh:
        tensors = {**shard.to_tensors(), "images": shard.images}
        put_shard(work, shard.start, tensors)
        work.report({"images": shard.stop, "of": work.protocol.images})
        yield tensors


def _final_latents(work: Work) -> Tensor:
    """Return the dense model's final latents of the calibration items.  # (n, C, h, w)"""
    items, seeds = items_and_seeds(work)
    size, done = work.batch_size, []
    with torch.no_grad():
        for start in range(0, len(items), size):
            part = slice(start, start + size)
            conditioning = encode(work.model, items[part], work.sampler.guidance_scale)
            noise = initial_latents(work.model, seeds[part])
            done.append(rollout(work.model, conditioning, noise, work.sampler).float().cpu())
    return torch.cat(done).contiguous()
