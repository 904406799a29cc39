"""Figures of one gate table, from the shards that have made and scored its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import safetensors.numpy

from dipgo_core.binding import subnet_from
from dipgo_core.config import SamplerSettings
from dipgo_core.evaluation.evaluate import summarise
from dipgo_core.evaluation.metrics import FEATURE_ROLES, Role
from dipgo_core.evaluation.reference import Reference, load_statistics
from dipgo_core.evaluation.shards import ShardResult, first_of, merge_shards
from dipgo_core.families import calls_of
from dipgo_core.subnet import SubNet
from orchestrator.facts import reference_path
from orchestrator.gains import stored_reference
from orchestrator.records import Record
from orchestrator.task.images import SHARD_FILE
from orchestrator.task.work import Outcome, Work, packed, shard_records


def run_evaluate(work: Work) -> Outcome:
    """Put the scores of all images together and sum them up; no image is made."""
    protocol = work.protocol
    shards = list(shard_records(work.store, work.task.options["shards"]))
    references: dict[str, Reference] = {
        role: _reference(work, role) for role in FEATURE_ROLES if role in protocol.scorers
    }
    whole = merge_shards(_parts(work, shards), protocol)
    if work.is_dense:
        whole = _with_known_features(whole, protocol.reference, references)
    artifacts = work.put("samples.safetensors", packed({"images": whole.samples}))
    if whole.scores:
        artifacts |= work.put("per_image.safetensors", packed(whole.scores))
    if whole.features:
        artifacts |= work.put("features.safetensors", packed(whole.features))
    figures = summarise(whole, protocol, references)
    subnet = _subnet(work, shards[0])
    outputs = {
        "metrics": {name: figure.to_json() for name, figure in figures.items()},
        "subnet": subnet.to_json(),
        "all_or_nothing_share": subnet.gates.all_or_nothing_share,
        "forwards": whole.forwards,
        "n_images": protocol.images,
        "batch_size": min(int(shard.outputs["batch_size"]) for shard in shards),
        "statistics": dict(work.task.options["statistics"]),
        **_macs(work, subnet),
    }
    return Outcome(outputs, artifacts)


def _parts(work: Work, shards: list[Record]) -> Iterator[ShardResult]:
    """Yield the shards one by one, each as far as the protocol asks for it."""
    for record in shards:
        data = work.store.get_artifact(record, SHARD_FILE)
        shard = ShardResult.from_tensors(safetensors.numpy.load(data))
        yield first_of(shard, work.protocol)


def _with_known_features(
    whole: ShardResult, reference: str, references: Mapping[str, Reference]
) -> ShardResult:
    """Return the dense run with the features of its images that are those of the reference."""
    if reference != "dense":
        return whole
    known = {role: one.features for role, one in references.items() if one.features is not None}
    return replace(whole, features={**whole.features, **known})


def _subnet(work: Work, first: Record) -> SubNet:
    """Return what was evaluated, as the task that made the images has described its sampler."""
    known = work.reference.outputs
    sampler = first.outputs["subnet_sampler"] or known["subnet_sampler"]
    return subnet_from(work.graph, work.gates, known["subnet_model"], sampler)


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
        kept = work.graph.macs(subnet.gates, convention, work.sampler.guidance_calls)
        counted[convention] = {"dense": whole, "kept": kept, "pruned_ratio": 1 - kept / whole}
    convention = work.task.inputs["macs_convention"]
    return {
        "macs": {**counted[convention], "convention": convention, "paper": counted["paper"]},
        "pruned_ratio": counted[convention]["pruned_ratio"],
    }
