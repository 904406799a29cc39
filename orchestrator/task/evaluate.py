"""Images and figures of one gate table, shard by shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.evaluation.evaluate import (
    Scorers,
    evaluate_shards,
    score_shards,
    summarise,
)
from dipgo_core.evaluation.metrics import FEATURE_ROLES, Role
from dipgo_core.evaluation.reference import Reference, load_statistics
from dipgo_core.evaluation.shards import ShardResult, merge_shards, shards_of
from dipgo_core.families import calls_of
from dipgo_core.subnet import SubNet
from orchestrator.facts import reference_path
from orchestrator.gains import stored_reference
from orchestrator.task.continued import continued
from orchestrator.task.reference import DenseImages
from orchestrator.task.scorers import scorers_of
from orchestrator.task.work import Outcome, Work, packed, put_shard, stored_shard


def run_evaluate(work: Work) -> Outcome:
    """Make and score the images of one gate table, shard by shard."""
    protocol = work.protocol
    scorers = scorers_of(work)
    known = continued(work)
    whole = merge_shards(_scored_shards(work, scorers, known), protocol)
    artifacts = work.put("samples.safetensors", packed({"images": whole.samples}))
    if whole.scores:
        artifacts |= work.put("per_image.safetensors", packed(whole.scores))
    if whole.features:
        artifacts |= work.put("features.safetensors", packed(whole.features))
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
        "statistics": dict(work.task.options["statistics"]),
        **_macs(work, subnet),
    }
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
    """Score the images that the reference has made; their features are known already."""
    dense = DenseImages(work)
    itself = work.protocol.reference == "dense"
    known = _references_of(work, scorers) if itself else {}
    features = {role: one.features for role, one in known.items() if one.features is not None}
    others = {role: network for role, network in scorers.items() if role not in features}
    batches = (batch for shard in shards for batch in dense.batches(shard, work.batch_size))
    scored = score_shards(
        batches, shards, work.protocol, work.items, others, None, device=work.device
    )
    for shard in scored:
        rows = {role: known[shard.start : shard.stop] for role, known in features.items()}
        yield replace(shard, features={**shard.features, **rows})


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
    return {role: _reference(work, role) for role in FEATURE_ROLES if role in scorers}


def _reference(work: Work, role: Role) -> Reference:
    """Return what the features of a role are compared with; kept from task to task."""
    protocol, options = work.protocol, work.task.options
    if protocol.reference.startswith("statistics:"):
        path = reference_path(options["reference"])
        return load_statistics(path, protocol.scorers[role])
    key = options["statistics"][role]
    if role not in _references or _references[role][:2] != (key, protocol.images):
        _references.pop(role, None)  # never two of them in memory
        found = stored_reference(work.store, key, protocol, role)
        _references[role] = (key, protocol.images, found)
    return _references[role][2]


#: The reference each role used last, with the key of its features and how many are compared.
_references: dict[Role, tuple[str, int, Reference]] = {}


def _macs(work: Work, subnet: SubNet) -> dict[str, Any]:
    """Count against the dense run of the protocol, which may have more calls than this one."""
    calls = calls_of(SamplerSettings(**work.protocol.sampler))
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
