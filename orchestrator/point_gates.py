"""A point before its gates are known, and its gates once what they follow from is there."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

from dipgo_core.config import SearchSettings
from dipgo_core.errors import TargetError
from dipgo_core.graph import BlockGraph
from dipgo_core.outcome import SearchOutcome
from dipgo_core.strategies import decisive
from orchestrator.methods import PointSpec, gates_of, searched_target
from orchestrator.model_tasks import ModelTasks
from orchestrator.planned import Point
from orchestrator.records import content_key


@dataclass(frozen=True)
class Resolution:
    """The gates of a point, or why it has none."""

    keep: tuple[str, ...] | None = None
    extrapolation: float = 0.0
    error: str | None = None


#: Resolutions kept between plans of one sweep, by point; what they follow from never changes.
Memo = MutableMapping[str, Resolution]


def unresolved_point(maker: ModelTasks, spec: PointSpec) -> Point:
    """Return what is known of a point before any record is."""
    model = maker.model
    reference_key = maker.reference("test").key
    at = searched_target(model, spec)
    search_key = None if spec.search is None else maker.search(spec.search, at).key
    identity = {
        "model": model.name,
        "reference": reference_key,
        "protocol": maker.protocol_hash,
        "method": spec.method,
        "sampler": spec.sampler.to_json(),
        "granularity": spec.granularity,
        "search": search_key,
        "target": spec.target,
        "variant": spec.variant,
        "postprocess": model.postprocess,
        "macs_convention": maker.sweep.macs_convention,
    }
    searched: SearchSettings | None = spec.search if spec.method == "search" else None
    told = decisive(searched) if searched else {}
    return Point(
        key=content_key(identity),
        model=model.name,
        model_id=model.settings.id,
        method=spec.method,
        strategy=searched.strategy if searched else None,
        loss=told.get("loss"),
        search=told or None,
        sampler=spec.sampler.to_json(),
        sampler_dense=model.sampler.to_json(),
        granularity=spec.granularity,
        target=spec.target,
        seed=spec.seed,
        variant=spec.variant,
        protocol_hash=maker.protocol_hash,
        reference_key=reference_key,
        statistics_keys=tuple(task.key for task in maker.statistics.values()),
        search_key=search_key,
        needs=(reference_key,) if search_key is None else (reference_key, search_key),
        label=spec.label,
    )


def resolve_gates(
    maker: ModelTasks, spec: PointSpec, graph: BlockGraph, outcome: SearchOutcome | None
) -> Resolution:
    """Return the gates of a point from the records they follow from, or why there are none."""
    try:
        gates = gates_of(spec, maker.model, graph, outcome, maker.sweep.macs_convention)
    except TargetError as error:
        return Resolution(error=str(error))
    return Resolution(keep=tuple(gates.to_strings()), extrapolation=gates.extrapolation)
