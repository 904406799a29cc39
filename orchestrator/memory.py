"""Peak GPU memory of the tasks of a model, and how they are run so that they fit. No torch.

What changes no result (images at a time, slices, what is computed again) goes into tasks' options.
Decoding in tiles changes images: it is chosen for all tasks of a model or for none, only where one
image does not fit otherwise, and is part of the protocol and so of the keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Final

from dipgo_core.config import Granularity, SearchSettings
from dipgo_core.evaluation.device import gpu_memory_bytes
from dipgo_core.evaluation.protocol import Split
from dipgo_core.families import calls_of, find_known
from dipgo_core.memory import Fit, Load, Search, checkpoints, fit_generation, fit_search
from dipgo_core.strategies import (
    MOST_AT_ONCE,
    NEEDS,
    PROBED_ITEMS,
    TABLE_STRATEGIES,
    ErrorsSettings,
)
from orchestrator.facts import ModelFacts
from orchestrator.methods import (
    STEP_MASKS,
    gated_layers,
    kinds_of_search,
    search_label,
    step_mask_search,
)
from orchestrator.resources import resources_of
from orchestrator.sweep_settings import AskedResources, ResourceKind, SweepFile, SweepModel

GB: Final = 10**9
_SPLITS: Final[tuple[Split, ...]] = ("test", "calibration")
#: What tells tasks of a kind apart: the split of their images, their number, what is searched.
What = Split | int | SearchSettings | ErrorsSettings
#: Sides of tiles are whole latents: 8 pixels in all known autoencoders.
_LATENT: Final = 8
#: What may take a GPU.
_KINDS: Final[tuple[ResourceKind, ...]] = ("reference", "search", "evaluate", "latency")
#: Pipelines that decode in float32 if the autoencoder asks for it and the rest is float16.
_UPCASTING: Final = ("sdxl",)


def gigabytes(size: int) -> str:
    """Return a size in 10^9 bytes, in as many digits as tell small ones apart."""
    return f"{size / GB:.{1 if size >= GB else 3}f}"


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One kind of work of a model: how it is run, and what it is estimated to need then.

    what: the split of its images, their number (latencies), the search, or the measurement of
    errors (whatever its seed). asked: images at a time as the sweep has it.
    """

    model: str
    kind: ResourceKind
    what: What
    label: str
    asked: int
    fit: Fit
    basis: str

    @property
    def choices(self) -> tuple[str, ...]:
        """What is done to make it fit, in words; () if it runs as asked."""
        run, said = self.fit.run, []
        if run.images != self.asked:
            said.append(f"{run.images} of {self.asked} images at a time")
        if run.checkpoint_calls is not None:
            again = "computed again" if run.checkpoint_calls else "kept"
            said.append(f"activations of calls {again}")
        if run.decoding.checkpointing:
            said.append("those of the decoder computed again")
        if run.decoding.slicing:
            said.append("decoded one by one")
        if run.decoding.tile:
            said.append(f"decoded in tiles of {run.decoding.tile} pixels, which changes images")
        return tuple(said)

    @property
    def problem(self) -> str:
        """What does not fit, by how much, and what to do about it."""
        need, limit = self.fit.need, self.fit.limit or 0
        parts = ", ".join(f"{name} {gigabytes(size)}" for name, size in need.parts.items())
        tried = f" ({'; '.join(self.choices)})" if self.choices else ""
        return (
            f"{self.model}: {self.kind} ({self.label}) needs about {gigabytes(need.total)} GB of "
            f"GPU memory{tried}, there are {gigabytes(limit)}: {parts}, and a margin. "
            f"{_NEXT[self.kind]}"
        )

    def to_json(self) -> dict[str, Any]:
        need = self.fit.need
        return {
            "model": self.model,
            "kind": self.kind,
            "label": self.label,
            "estimated_bytes": need.total,
            "parts": dict(need.parts),
            "unknown": list(need.unknown),
            "gpu_bytes": self.fit.limit,
            "fits": self.fit.fits,
            "run": asdict(self.fit.run),
            "basis": self.basis,
        }


def without_repetition(rows: Iterable[MemoryRow]) -> tuple[MemoryRow, ...]:
    """Return one row for those that differ in their label alone, which tells how many there are."""
    alike: dict[str, list[MemoryRow]] = {}
    for row in rows:
        told = {name: value for name, value in row.to_json().items() if name != "label"}
        alike.setdefault(json.dumps(told), []).append(row)
    return tuple(
        replace(first, label=f"{first.label}, and {len(others)} like it") if others else first
        for first, *others in alike.values()
    )


@dataclass(frozen=True, kw_only=True)
class ModelMemory:
    """How the tasks of one model are run. tile: side of the tiles that all of them decode in."""

    rows: tuple[MemoryRow, ...]
    tile: int | None

    def fit(self, kind: ResourceKind, what: What) -> Fit:
        """Return how a task is run."""
        return self._fits[kind, repr(what)]

    @cached_property
    def _fits(self) -> Mapping[tuple[ResourceKind, str], Fit]:
        return {(row.kind, repr(row.what)): row.fit for row in self.rows}


def with_gpu_memory(sweep: SweepFile, found_gb: float | None) -> SweepFile:
    """Fill in the memory of the GPU that is there, where the sweep file says none.

    Tasks that take a part of a GPU have that part of its memory.
    """

    def filled(asked: AskedResources) -> AskedResources:
        if asked.gpus == 0 or asked.gpu_memory_gb is not None or found_gb is None:
            return asked
        return replace(asked, gpu_memory_gb=found_gb * min(1.0, asked.gpus or 1.0))

    each: dict[str, Any] = {kind: filled(getattr(sweep.resources, kind)) for kind in _KINDS}
    return replace(sweep, resources=replace(sweep.resources, **each))


def local_gpu_memory_gb() -> float | None:
    """Return the memory of this machine's first GPU in 10^9 bytes, None without one."""
    found = gpu_memory_bytes()
    return None if found is None else found / GB


@dataclass(frozen=True)
class ModelLoads:
    """Works out the memory of one model's tasks."""

    sweep: SweepFile
    model: SweepModel
    facts: ModelFacts

    @cached_property
    def memory(self) -> ModelMemory:
        whole = tuple(self._rows(None))
        if any(row.fit.fits is False for row in whole):
            tile = self.facts.height // 2 // _LATENT * _LATENT
            tiled = tuple(self._rows(tile))
            if not any(row.fit.fits is False for row in tiled):
                return ModelMemory(rows=tiled, tile=tile)
        return ModelMemory(rows=whole, tile=None)

    def _rows(self, tile: int | None) -> Iterator[MemoryRow]:
        for split in _SPLITS:
            yield self._generation("reference", split, self._batch(split), tile=tile)
            yield self._generation(
                "evaluate", split, self._batch(split), tile=tile, gated=self._granularity
            )
        for settings in self._searches:
            yield self._search(settings, tile)
        for measured in self._measured:
            yield self._errors(measured, tile)
        if "latency" in self.model.evaluate.metrics:
            for size in self.sweep.latency.batch_size:
                yield self._generation(
                    "latency", size, size, tile=tile, gated=self._granularity, fixed=True
                )

    def _generation(
        self,
        kind: ResourceKind,
        what: What,
        images: int,
        *,
        tile: int | None,
        gated: Granularity | None = None,
        fixed: bool = False,
    ) -> MemoryRow:
        scorers = dict(self.facts.scorer_bytes) if kind == "evaluate" else {}
        load = replace(self._load, scorers=scorers)
        fit = fit_generation(load, images, self._limit(kind), gated=gated, fixed=fixed, tile=tile)
        return self._row(kind, what, images, fit)

    def _search(self, settings: SearchSettings, tile: int | None) -> MemoryRow:
        if settings.strategy == STEP_MASKS:  # compares latents; its batch decides its result
            images, limit = settings.batch_size, self._limit("search")
            fit = fit_generation(self._load, images, limit, fixed=True, decodes=False)
            return self._row("search", settings, images, fit)
        if settings.strategy in TABLE_STRATEGIES:
            return self._candidates(settings, tile)
        calls, stepwise = calls_of(self.model.sampler), settings.strategy == "dipgo_stepwise"
        if stepwise:  # a call is differentiated alone, beside what the ones before have given
            calls = min(calls, settings.staleness + 1)
        search = Search(
            images=settings.batch_size,
            calls=calls,
            granularity=settings.granularity,
            gates=self._gates(settings.granularity),
            query_dim=settings.query_dim,
            checkpoints=self._checkpoints(calls * settings.batch_size),
            through_decoder=not stepwise,
        )
        fit = fit_search(self._load, search, self._limit("search"), tile)
        return self._row("search", settings, settings.batch_size, fit)

    def _candidates(self, settings: SearchSettings, tile: int | None) -> MemoryRow:
        """A search that runs candidates keeps what one call has given."""
        return self._compared(settings, min(settings.samples, MOST_AT_ONCE), tile, caches=1)

    def _errors(self, settings: ErrorsSettings, tile: int | None) -> MemoryRow:
        """Measuring reuses keeps what blocks have given in the calls before, and in this one."""
        return self._compared(settings, PROBED_ITEMS, tile, caches=settings.staleness + 2)

    def _compared(
        self,
        settings: SearchSettings | ErrorsSettings,
        images: int,
        tile: int | None,
        *,
        caches: int,
    ) -> MemoryRow:
        """Runs without gradients, whose latents or pixels are compared with the dense run's."""
        pixels = settings.objective == "pixel"  # decoded in float32 where the decoder asks for it
        fit = fit_generation(
            replace(self._load, pipeline_upcasts=pixels or self._load.pipeline_upcasts),
            images,
            self._limit("search"),
            gated=settings.granularity,
            fixed=True,
            decodes=pixels,
            caches=caches,
            tile=tile,
        )
        return self._row("search", settings, images, fit)

    def _row(self, kind: ResourceKind, what: What, asked: int, fit: Fit) -> MemoryRow:
        return MemoryRow(
            model=self.model.name,
            kind=kind,
            what=what,
            label=_label(what),
            asked=asked,
            fit=fit,
            basis=self._basis,
        )

    @cached_property
    def _load(self) -> Load:
        settings = self.model.settings
        return Load(
            sizes=self.facts.sizes,
            dtype=settings.dtype,
            side=self.facts.height,
            guided=self.model.sampler.guidance_scale > 1,
            pipeline_upcasts=self.model.family in _UPCASTING,
        )

    @cached_property
    def _searches(self) -> tuple[SearchSettings, ...]:
        masks = step_mask_search(self.model)
        return (*kinds_of_search(self.model), *([] if masks is None else [masks]))

    @cached_property
    def _measured(self) -> tuple[ErrorsSettings, ...]:
        """Return the measurements of errors that searches begin with."""
        found = [one for one in self._searches if "errors" in NEEDS.get(one.strategy, ())]
        return tuple(dict.fromkeys(ErrorsSettings.of(one) for one in found))

    @property
    def _granularity(self) -> Granularity:
        """The finer one of those that are searched: it keeps more caches."""
        return "layer" if gated_layers(self.model) else "block"

    def _batch(self, split: Split) -> int:
        source = self.model.evaluate if split == "test" else self.model.calibration
        return source.batch_size

    def _limit(self, kind: ResourceKind) -> int | None:
        memory = resources_of(self.sweep, kind, self.facts).gpu_memory_gb
        return None if memory is None else round(memory * GB)

    @property
    def _traced(self) -> str:
        """The known model that calls and decoding were traced of."""
        sizes = self.facts.sizes
        return sizes.like or self.model.settings.id if sizes else ""

    def _gates(self, granularity: Granularity) -> int:
        known = find_known(self._traced)
        return known.gates_of(granularity) if known else 0

    def _checkpoints(self, forwards: int) -> bool:
        """Whether a search computes calls again by itself."""
        known = find_known(self._traced)
        return known is None or checkpoints(known.macs, forwards)

    @property
    def _basis(self) -> str:
        sizes, side = self.facts.sizes, self.facts.height
        if sizes is None:
            return "unknown: neither a known model nor files that are here"
        if not sizes.calls:
            return "weights from their files; no known model has as many parameters"
        scaled = "" if sizes.side == side else f", from {sizes.side} pixels to {side}"
        if sizes.like:
            return f"weights from their files, calls as of {sizes.like}{scaled}"
        return f"traced without weights{scaled}"


def _label(what: What) -> str:
    if isinstance(what, SearchSettings):
        return search_label(what)
    if isinstance(what, ErrorsSettings):
        return "errors of reuses" + (" of layers" if what.granularity == "layer" else "")
    return f"batch of {what}" if isinstance(what, int) else what


_SMALLER: Final = "Give it a larger GPU, or the model a dtype of 16 bits or a smaller resolution"
_NEXT: Final[Mapping[ResourceKind, str]] = {
    "reference": f"{_SMALLER}.",
    "evaluate": f"{_SMALLER}, or leave out metrics of large scorers.",
    "search": f"{_SMALLER}; fewer sampler.steps keep fewer caches, best_step_mask takes "
    "search.calibration.batch_size images at a time, and candidates search.samples.",
    "latency": f"{_SMALLER}, or lower latency.batch_size.",
}
