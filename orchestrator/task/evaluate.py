"""Images and figures of one gate table, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from dipgo_core.config import SamplerSettings
from dipgo_core.evaluation.evaluate import (
    FEATURE_ROLES,
    DenseImages,
    Scorers,
    ShardResult,
    evaluate_shards,
    load_scorers,
    merge_shards,
    score_images,
    shards_of,
    summarise,
)
from dipgo_core.evaluation.fid import folder_reference
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.evaluation.reference import Reference, load_statistics, reference_of
from dipgo_core.families import num_calls
from dipgo_core.pipelines import subnet_of
from dipgo_core.subnet import SubNet
from orchestrator.facts import reference_path
from orchestrator.task.continued import continued
from orchestrator.task.work import Outcome, Work, packed, put_shard, stored_shards


def run_evaluate(work: Work) -> Outcome:
    """Make and score the images of one gate table, shard by shard."""
    protocol = work.protocol
    scorers = _scorers(
        json.dumps(protocol.to_json(), sort_keys=True),
        json.dumps(work.task.options["scorers"], sort_keys=True),
        work.device,
    )
    shards = []
    for shard in _scored_shards(work, scorers):
        shards.append(shard)
        work.report({"images": shard.stop, "of": protocol.images})
    whole = merge_shards(shards, protocol)
    figures = summarise(shards, protocol, _references_of(work, scorers))
    subnet = subnet_of(work.model, work.graph, work.sampler, work.gates)
    outputs = {
        "metrics": {name: figure.to_json() for name, figure in figures.items()},
        "subnet": subnet.to_json(),
        "all_or_nothing_share": subnet.gates.all_or_nothing_share,
        "forwards": whole.forwards,
        "n_images": protocol.images,
        "n_continued": shards[0].stop if "continues" in work.task.options else 0,
        **_macs(work, subnet),
    }
    artifacts = work.put("samples.safetensors", packed({"images": whole.samples}))
    if whole.scores:
        artifacts |= work.put("per_image.safetensors", packed(whole.scores))
    if whole.features:
        artifacts |= work.put("features.safetensors", packed(whole.features))
    return Outcome(outputs, artifacts)


def _scored_shards(work: Work, scorers: Scorers) -> Iterator[ShardResult]:
    """Yield every shard; those of an interrupted run or a lower rung are not computed again."""
    known = continued(work)
    first = 0 if known is None else known.stop
    if known is not None:
        yield known
    stored = stored_shards(work, first)
    yield from (ShardResult.from_tensors(arrays) for arrays in stored.values())
    make = _dense_shards if is_dense(work) else _pruned_shards
    for shard in make(work, scorers, _DenseImages(work), first, stored):
        put_shard(work, shard.start, shard.to_tensors())
        yield shard


def is_dense(work: Work) -> bool:
    """Whether this is the dense run itself, whose images the reference has made."""
    return bool(work.gates.keep.all()) and work.sampler.to_json() == work.protocol.sampler


def _dense_shards(
    work: Work, scorers: Scorers, dense: DenseImages, first: int, done: Collection[int]
) -> Iterator[ShardResult]:
    for shard in shards_of(work.protocol, work.shard_size, first):
        if shard.start not in done:
            images = dense(shard.start, shard.stop).to(work.device)
            yield score_images(images, shard, work.protocol, work.items, scorers, None)


def _pruned_shards(
    work: Work, scorers: Scorers, dense: DenseImages, first: int, done: Collection[int]
) -> Iterator[ShardResult]:
    return evaluate_shards(
        work.model,
        work.protocol,
        work.items,
        scorers,
        sampler=work.sampler,
        gates=None if work.gates.keep.all() else work.gates,
        graph=work.graph,
        dense=dense,
        shard_size=work.shard_size,
        batch_size=work.batch_size,
        first=first,
        done=done,
    )


class _DenseImages:
    """The images of the dense run, read from the reference's artifacts, one of them at a time."""

    def __init__(self, work: Work) -> None:
        self._work = work
        names = sorted(n for n in work.reference.artifacts if n.startswith("images-"))
        self._starts = {int(name[7:-12]): name for name in names}  # images-000500.safetensors
        self._read: tuple[str, torch.Tensor] = ("", torch.empty(0))

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """Return the images [start, stop), uint8.  # (n, 3, H, W)"""
        parts = []
        while start < stop:
            first = max(known for known in self._starts if known <= start)
            part = self._shard(self._starts[first])[start - first : stop - first]
            parts.append(part)
            start += len(part)
        return torch.cat(parts)

    def _shard(self, name: str) -> torch.Tensor:
        if self._read[0] != name:
            data = self._work.store.get_artifact(self._work.reference, name)
            images = torch.from_numpy(safetensors.numpy.load(data)["images"])
            self._read = (name, images)
        return self._read[1]


def _references_of(work: Work, scorers: Scorers) -> dict[str, Reference]:
    """Return what the features of each role are compared with."""
    return {role: _reference(work, scorers[role]) for role in FEATURE_ROLES if role in scorers}


def _reference(work: Work, extractor: Any) -> Reference:
    """Return what features are compared with; kept from task to task."""
    kind = work.protocol.reference.partition(":")[0]
    if kind == "dense":
        return _dense_reference(work, extractor)
    path = reference_path(work.task.options["reference"])
    if kind == "statistics":
        return load_statistics(path, extractor.scorer)
    known = (work.protocol.reference, extractor.scorer.digest)
    if known not in _references:
        _references.clear()
        _references[known] = folder_reference(path, extractor)
    return _references[known]


def _dense_reference(work: Work, extractor: Any) -> Reference:
    known = (work.reference.key, extractor.scorer.digest)
    if known not in _references:
        _references.clear()
        dense = _DenseImages(work)
        parts = [
            extractor(dense(shard.start, shard.stop))
            for shard in shards_of(work.protocol, work.shard_size)
        ]
        _references[known] = reference_of(np.concatenate(parts), extractor.scorer)
    return _references[known]


#: The reference last used, by its id and the extractor's digest.
_references: dict[tuple[str, str], Reference] = {}


@lru_cache(maxsize=2)
def _scorers(protocol_json: str, names_json: str, device: str) -> Scorers:
    """Load scorers once a worker."""
    protocol = Protocol.from_json(json.loads(protocol_json))
    return load_scorers(protocol, json.loads(names_json), device=device)


def _macs(work: Work, subnet: SubNet) -> dict[str, Any]:
    """Count against the dense run of the protocol, which may have more calls than this one."""
    dense = SamplerSettings(**work.protocol.sampler)
    calls = num_calls(dense.scheduler, dense.steps)
    counted = {}
    for convention in ("all", "paper"):
        whole = calls * work.graph.call_macs(convention)
        kept = work.graph.macs(subnet.gates, convention)
        counted[convention] = {"dense": whole, "kept": kept, "pruned_ratio": 1 - kept / whole}
    convention = work.task.inputs["macs_convention"]
    return {
        "macs": {**counted[convention], "convention": convention, "paper": counted["paper"]},
        "pruned_ratio": counted[convention]["pruned_ratio"],
    }
