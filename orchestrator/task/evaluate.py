"""Images and figures of one gate table, shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from dipgo_core.config import SamplerSettings
from dipgo_core.evaluation.evaluate import (
    FEATURE_ROLES,
    Scorers,
    evaluate_shards,
    load_scorers,
    score_shards,
    summarise,
)
from dipgo_core.evaluation.fid import folder_reference
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.evaluation.reference import Reference, load_statistics, reference_of
from dipgo_core.evaluation.shards import ShardResult, merge_shards, shards_of
from dipgo_core.families import num_calls
from dipgo_core.pipelines import subnet_of
from dipgo_core.subnet import SubNet
from orchestrator.facts import reference_path
from orchestrator.task.continued import continued
from orchestrator.task.reference import DenseImages
from orchestrator.task.work import Outcome, Work, packed, put_shard, stored_shard


def run_evaluate(work: Work) -> Outcome:
    """Make and score the images of one gate table, shard by shard."""
    protocol = work.protocol
    scorers = _scorers(
        json.dumps(protocol.to_json(), sort_keys=True),
        json.dumps(work.task.options["scorers"], sort_keys=True),
        work.device,
    )
    known = continued(work)
    whole = merge_shards(_scored_shards(work, scorers, known), protocol)
    figures = summarise(whole, protocol, _references_of(work, scorers))
    subnet = subnet_of(work.model, work.graph, work.sampler, work.gates)
    outputs = {
        "metrics": {name: figure.to_json() for name, figure in figures.items()},
        "subnet": subnet.to_json(),
        "all_or_nothing_share": subnet.gates.all_or_nothing_share,
        "forwards": whole.forwards,
        "n_images": protocol.images,
        "n_continued": 0 if known is None else known.stop,
        "batch_size": work.batch_size,
        **_macs(work, subnet),
    }
    artifacts = work.put("samples.safetensors", packed({"images": whole.samples}))
    if whole.scores:
        artifacts |= work.put("per_image.safetensors", packed(whole.scores))
    if whole.features:
        artifacts |= work.put("features.safetensors", packed(whole.features))
    return Outcome(outputs, artifacts)


def _scored_shards(
    work: Work, scorers: Scorers, known: ShardResult | None
) -> Iterator[ShardResult]:
    """Yield every shard; those of an interrupted run or another rung are not computed again."""
    first = 0 if known is None else known.stop
    if known is not None:
        yield known
    missing = []
    for shard in shards_of(work.protocol, work.shard_size, first):
        stored = stored_shard(work, shard)
        if stored is None:
            missing.append(shard)
        else:
            yield ShardResult.from_tensors(stored)
    make = _dense_shards if is_dense(work) else _pruned_shards
    for result in make(work, scorers, missing):
        put_shard(work, result.start, result.to_tensors())
        work.report({"images": result.stop, "of": work.protocol.images})
        yield result


def is_dense(work: Work) -> bool:
    """Whether this is the dense run itself, whose images the reference has made."""
    return bool(work.gates.keep.all()) and work.sampler.to_json() == work.protocol.sampler


def _dense_shards(work: Work, scorers: Scorers, shards: Sequence[range]) -> Iterator[ShardResult]:
    """Score the images that the reference has made."""
    dense = DenseImages(work)
    batches = (batch for shard in shards for batch in dense.batches(shard, work.batch_size))
    return score_shards(
        batches, shards, work.protocol, work.items, scorers, None, device=work.device
    )


def _pruned_shards(work: Work, scorers: Scorers, shards: Sequence[range]) -> Iterator[ShardResult]:
    return evaluate_shards(
        work.model,
        work.protocol,
        work.items,
        scorers,
        sampler=work.sampler,
        gates=None if work.gates.keep.all() else work.gates,
        graph=work.graph,
        dense=DenseImages(work),
        shards=shards,
        batch_size=work.batch_size,
    )


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
        images = DenseImages(work).batches(range(work.protocol.images), work.batch_size)
        parts = [extractor(batch.images) for batch in images]
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
