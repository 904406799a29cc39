"""What one task occupies on its node: as the sweep file says, else by the size of its model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from dipgo_core.families.sizes import ModelSizes
from orchestrator.facts import ModelFacts
from orchestrator.sweep_settings import (
    AskedResources,
    ResourceKind,
    SweepFile,
    TaskResources,
)

#: A model of more parameters takes a GPU where the sweep file does not say what it takes.
FULL_SIZE: Final = 200_000_000
_SMALL: Final = TaskResources()
_LARGE: Final = TaskResources(cpus=2, gpus=1)


@dataclass(frozen=True, kw_only=True)
class ResourceRow:
    """What tasks of a kind of one model occupy, and how that is known."""

    model: str
    kind: ResourceKind
    resources: TaskResources
    basis: str

    def to_json(self) -> dict[str, Any]:
        about = {"model": self.model, "kind": self.kind, "basis": self.basis}
        return {**about, **asdict(self.resources)}


def resources_of(sweep: SweepFile, kind: ResourceKind, facts: ModelFacts) -> TaskResources:
    """Return what a task of this kind of one model occupies.

    Latencies of a sweep share one device: settle what they take first (`with_latency_resources`).
    """
    asked: AskedResources = getattr(sweep.resources, kind)
    return _settled(asked, _estimate(kind, facts.sizes))


def with_latency_resources(sweep: SweepFile, facts: Mapping[str, ModelFacts]) -> SweepFile:
    """Fill in what latencies take, which is the same for all models: figures of one device."""
    found = latency_resources(sweep, facts)
    asked = AskedResources(**asdict(found))
    return replace(sweep, resources=replace(sweep.resources, latency=asked))


def latency_resources(sweep: SweepFile, facts: Mapping[str, ModelFacts]) -> TaskResources:
    """Return what every latency of a sweep takes: what the largest of the timed models needs."""
    timed = (m.name for m in sweep.models if "latency" in m.evaluate.metrics)
    estimates = [_estimate("latency", facts[name].sizes) for name in timed]
    largest = max(estimates, key=lambda one: one.gpus, default=_SMALL)
    return _settled(sweep.resources.latency, largest)


def resource_rows(
    sweep: SweepFile, model: str, kinds: Iterable[ResourceKind], facts: ModelFacts
) -> tuple[ResourceRow, ...]:
    """Return what the tasks of one model occupy, by kind."""
    return tuple(
        ResourceRow(
            model=model,
            kind=kind,
            resources=resources_of(sweep, kind, facts),
            basis=_basis(getattr(sweep.resources, kind), kind, facts.sizes),
        )
        for kind in kinds
    )


def _estimate(kind: ResourceKind, sizes: ModelSizes | None) -> TaskResources:
    """Return what a kind takes by the size of its model; scores are computed without it."""
    large = sizes is not None and _parameters(sizes) > FULL_SIZE
    return _LARGE if large and kind != "score" else _SMALL


def _settled(asked: AskedResources, estimate: TaskResources) -> TaskResources:
    """Return what was asked for, the rest as estimated; without a GPU nothing is asked of one."""
    cpus = estimate.cpus if asked.cpus is None else asked.cpus
    gpus = estimate.gpus if asked.gpus is None else asked.gpus
    if not gpus:
        return TaskResources(cpus=cpus)
    return TaskResources(
        cpus=cpus, gpus=gpus, gpu_memory_gb=asked.gpu_memory_gb, accelerator=asked.accelerator
    )


def _basis(asked: AskedResources, kind: ResourceKind, sizes: ModelSizes | None) -> str:
    if kind == "latency":  # settled before any model is looked at
        return "one device for all: the sweep file, else the largest model"
    if asked.cpus is not None and asked.gpus is not None:
        return "the sweep file"
    if kind == "score":
        return "figures are computed on a processor"
    if sizes is None:
        return "the size of the model is unknown: taken as small"
    size = "full-size" if _parameters(sizes) > FULL_SIZE else "small"
    return f"{_parameters(sizes) / 1e9:.2g} G parameters: a {size} model"


def _parameters(sizes: ModelSizes) -> int:
    return sizes.denoiser + sizes.text + sizes.decoder
