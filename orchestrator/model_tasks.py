"""The tasks of one model: what decides each result (the key), and how it is run (the rest)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, TypeVar

from dipgo_core import NUMERICS_VERSION
from dipgo_core.config import SamplerSettings, SearchSettings
from dipgo_core.evaluation.metrics import FEATURE_ROLES, METRICS, PAIRED, PER_IMAGE, Role
from dipgo_core.evaluation.protocol import Protocol, Split
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.evaluation.shards import cut
from dipgo_core.memory import Fit
from dipgo_core.strategies import (
    AT_TARGETS,
    NEEDS,
    TABLE_STRATEGIES,
    ErrorsSettings,
    Need,
    decisive,
    effective,
)
from orchestrator.bars import judged_by
from orchestrator.explore import Generation, asked, stand_in
from orchestrator.facts import ModelFacts, scorer_places
from orchestrator.memory import ModelLoads, ModelMemory
from orchestrator.methods import PointSpec, point_specs, search_label, step_mask_settings
from orchestrator.model_protocols import ModelProtocols
from orchestrator.racing import Candidate, alpha_of_rung, raced_metrics
from orchestrator.records import Task, TaskKind
from orchestrator.resources import resources_of
from orchestrator.sweep_settings import ResourceKind, SweepFile, SweepModel
from orchestrator.task_keys import SharedTexts

T = TypeVar("T")

#: Libraries that decide images, and those that only decide what images are found to be worth.
_GENERATING = ("torch", "diffusers", "transformers")
_SCORING = ("torchmetrics", "torch-fidelity", "torchvision")

#: The options that say where a model lies here, and what they replace.
_LOCAL: Final = {"model_folder": "id", "model_base": "base"}

#: Tasks that load no pipeline.
_LIGHT: Final[tuple[TaskKind, ...]] = ("reference", "statistics", "evaluate", "race", "explore")


@cache
def numerics_versions(*, scored: bool) -> dict[str, str]:
    """Return the versions that decide a result: ours, and the minor ones of the libraries."""
    names = (*_GENERATING, *_SCORING) if scored else _GENERATING
    return {"dipgo": str(NUMERICS_VERSION), **{name: _minor(version(name)) for name in names}}


def _minor(text: str) -> str:
    return ".".join(text.split("+")[0].split(".")[:2])


def _held(fit: Fit) -> dict[str, Any]:
    """Return options of what a task may hold of a GPU: how it decodes, and the estimate."""
    decoding = {k: v for k, v in asdict(fit.run.decoding).items() if v and k != "tile"}
    known = fit.limit is not None and not fit.need.unknown
    return {
        **({"decoding": decoding} if decoding else {}),
        **({"estimated_bytes": fit.need.total} if known else {}),
    }


@dataclass(frozen=True)
class Way:
    """One way to run a model: the rows of a gate table, what they switch, and the sampler."""

    sampler: SamplerSettings
    granularity: str
    keep: tuple[str, ...]
    extrapolation: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelTasks:
    """Makes the tasks of one model of a sweep, each once.

    device: name of the device that latencies are measured on.
    """

    sweep: SweepFile
    model: SweepModel
    facts: ModelFacts
    device: str
    _texts: SharedTexts = field(default_factory=SharedTexts, repr=False, compare=False)
    _made: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def memory(self) -> ModelMemory:
        """How tasks are run so that they fit on their GPU."""
        return ModelLoads(self.sweep, self.model, self.facts).memory

    @cached_property
    def protocols(self) -> ModelProtocols:
        return ModelProtocols(model=self.model, facts=self.facts, tile=self.memory.tile)

    @cached_property
    def protocol_hash(self) -> str:
        return self.protocols.top.hash

    @cached_property
    def measures_latency(self) -> bool:
        return "latency" in self.model.evaluate.metrics

    @cached_property
    def specs(self) -> tuple[PointSpec, ...]:
        """Every point of the model."""
        return tuple(point_specs(self.model))

    # shards -------------------------------------------------------------------------------------

    def layouts(self, split: Split, images: int) -> Iterator[tuple[range, ...]]:
        """Yield ways to cut the first images of a split into shards, the one to plan first.

        It has a cut at every rung, so that a higher one takes the shards of a lower one as they
        are. The others are those of runs without a race, whose last shard may have more images.
        """
        size = self.sweep.resources.images_per_shard
        rungs = [protocol.images for protocol in self.protocols.rungs] if split == "test" else []
        yield cut(range(images), size, rungs)
        if len(rungs) > 1:
            for whole in (n for n in rungs if n >= images):
                shards = cut(range(whole), size)
                yield tuple(shard for shard in shards if shard.start < images)

    def dense_shard(self, split: Split, images: range) -> Task:
        """Images of the dense run, and on the calibration split their final latents."""
        return self.once(("dense", split, images), lambda: self._dense_shard(split, images))

    def _dense_shard(self, split: Split, images: range) -> Task:
        return self._task(
            "images",
            self.model.sampler,
            self._range(split, images),
            resources="reference",
            options=self._batch("reference", split),
            label=f"dense images, {split}, {_named(images)}",
        )

    def shard(self, way: Way, split: Split, images: range, label: str) -> Task:
        """Images of a way to run the model, scored."""
        return self.once(
            ("shard", way, split, images), lambda: self._shard(way, split, images, label)
        )

    def _shard(self, way: Way, split: Split, images: range, label: str) -> Task:
        metrics, scorers = self._scored[split, self._is_dense(way)]
        places = scorer_places(self.model)
        return self._task(
            "images",
            way.sampler,
            {
                **self._range(split, images),
                **self._gates(way),
                "granularity": way.granularity,
                "metrics": metrics,
                "scorers": scorers,
            },
            resources="evaluate",
            scored=True,
            needs=(self.reference(split).key,),
            options={
                **self._batch("evaluate", split),
                "scorers": {role: places[role] for role in scorers},
            },
            label=f"{_of_split(label, split)}, {_named(images)}",
        )

    @cached_property
    def _scored(self) -> dict[tuple[Split, bool], tuple[list[str], dict[Role, Any]]]:
        """The metrics and networks of a split's images, of the dense run itself or another one.

        All that the top rung asks for: a lower one leaves out what it does not. The dense run is
        compared with no other, and the features of its images are those of the reference.
        """
        found = {}
        both: tuple[tuple[Split, Protocol], ...] = (
            ("test", self.protocols.top),
            ("calibration", self.protocols.calibration),
        )
        for split, protocol in both:
            for itself in (False, True):
                metrics = [m for m in protocol.metrics if m in PER_IMAGE]
                if itself:
                    metrics = [m for m in metrics if m not in PAIRED]
                roles = {METRICS[m].role for m in metrics}
                if not (itself and protocol.reference == "dense"):
                    roles |= set(FEATURE_ROLES)
                known = protocol.scorers.items()
                networks = {role: one.to_json() for role, one in known if role in roles}
                found[split, itself] = (metrics, networks)
        return found

    def _is_dense(self, way: Way) -> bool:
        return way.sampler == self.model.sampler and not any("0" in row for row in way.keep)

    def _range(self, split: Split, images: range) -> dict[str, Any]:
        decides = self.protocols.endless_json[split]
        return {"protocol": decides, "start": images.start, "stop": images.stop}

    # what is made of shards -----------------------------------------------------------------------

    def reference(self, split: Split) -> Task:
        """The dense model: block graph, images, and final latents on the calibration split."""
        return self.once(("reference", split), lambda: self._reference(split))

    def _reference(self, split: Split) -> Task:
        return self._task(
            "reference",
            self.model.sampler,
            self._range(split, range(self.protocols.images(split).images)),
            resources="score",
            label=f"dense images, {split}",
        )

    @cached_property
    def statistics(self) -> Mapping[Role, Task]:
        """Features of the reference images, by role; those of a statistics file need no task."""
        if self.facts.reference.startswith("statistics:"):
            return {}
        known = self.protocols.top.scorers.items()
        return {role: self._statistics(role, one) for role, one in known if role in FEATURE_ROLES}

    def _statistics(self, role: Role, scorer: Scorer) -> Task:
        """The key of a folder's features says nothing of the model: all models share them."""
        dense = self.facts.reference == "dense"
        batch = self._batch("evaluate", "test")
        task = self._task(
            "statistics",
            self.model.sampler,
            {"images": self.facts.reference, "role": role, "scorer": scorer.to_json()},
            resources="evaluate",
            scored=True,
            needs=(self.reference("test").key,) if dense else (),
            options={
                **batch,
                "scorer": scorer_places(self.model)[role],
                "reference": self.facts.reference_value,
            },
            label=f"reference features, {scorer.id}",
        )
        if dense:
            protocol = self.protocols.images_json["test"]
            return replace(task, inputs={**task.inputs, "protocol": protocol})
        shared = {k: v for k, v in task.inputs.items() if k not in ("model", "sampler")}
        return replace(task, inputs=shared)

    def evaluate(self, way: Way, split: Split, label: str, *, rung: int = -1) -> Task:
        """Figures of one gate table, which shards feed; no table is ever evaluated twice.

        rung: index into the rungs, on the test split.
        """
        return self.once(
            ("evaluate", way, split, rung), lambda: self._evaluate(way, split, label, rung)
        )

    def _evaluate(self, way: Way, split: Split, label: str, rung: int) -> Task:
        known = self.protocols
        protocol = known.rungs_json[rung] if split == "test" else known.calibration_json
        statistics = {
            role: task.key for role, task in self.statistics.items() if role in protocol["scorers"]
        }
        return self._task(
            "evaluate",
            way.sampler,
            {
                **self._gates(way),
                "protocol": protocol,
                "granularity": way.granularity,
                "macs_convention": self.sweep.macs_convention,
            },
            resources="score",
            scored=True,
            needs=(self.reference(split).key, *statistics.values()),
            options={"reference": self.facts.reference_value, "statistics": statistics},
            label=_of_split(label, split),
        )

    # searches, races, latencies -------------------------------------------------------------------

    def search(self, settings: SearchSettings, target: float | None) -> Task:
        """One search; it serves every target, unless its strategy searches at one."""
        own = target if settings.strategy in AT_TARGETS else None
        return self.once(
            ("search", repr(settings), own), lambda: self._search(effective(settings), own)
        )

    def _search(self, settings: SearchSettings, target: float | None) -> Task:
        before = self.found_before(settings, target)
        found: dict[str, str] = {need: task.key for need, task in before.items()}
        at: dict[str, Any] = {"target": target}
        if settings.strategy in TABLE_STRATEGIES:  # calls are whole by any convention
            at["macs_convention"] = self.sweep.macs_convention
        return self._task(
            "search",
            self.model.sampler,
            {
                "search": decisive(settings),
                "calibration": self.protocols.images_json["calibration"],
                **found,
                **({} if target is None else at),
            },
            resources="search",
            needs=(self.reference("calibration").key, *found.values()),
            options=self._ways(settings),
            label=search_label(settings) + ("" if target is None else f" at {target:g}"),
        )

    def found_before(self, settings: SearchSettings, target: float | None) -> dict[Need, Task]:
        """Return the tasks that a search takes what it begins with from, and shares with others."""
        needed = NEEDS.get(settings.strategy, ())
        found: dict[Need, Task] = {}
        if "errors" in needed:
            found["errors"] = self.errors(ErrorsSettings.of(settings))
        if "step_masks" in needed:
            found["step_masks"] = self.search(step_mask_settings(self.model), target)
        return found

    def errors(self, settings: ErrorsSettings) -> Task:
        """Measured errors of single reuses, which serve all searches and targets."""
        return self.once(("errors", settings), lambda: self._errors(settings))

    def _errors(self, settings: ErrorsSettings) -> Task:
        layers = " of layers" if settings.granularity == "layer" else ""
        return self._task(
            "errors",
            self.model.sampler,
            {
                "errors": settings.to_json(),
                "calibration": self.protocols.images_json["calibration"],
            },
            resources="search",
            needs=(self.reference("calibration").key,),
            options=_held(self.memory.fit("search", settings)),
            label=f"errors of reuses{layers}",
        )

    @cached_property
    def raced(self) -> tuple[str, ...]:
        """Metrics whose fronts a race must keep: those asked for, else the sweep's own quality."""
        measured = raced_metrics(self.protocols.top.metrics)
        quality = self.sweep.objective.quality
        own = "kid" if quality == "fid" else quality
        return self.model.evaluate.race or ((own,) if own in measured else measured)

    def race(self, rung: int, candidates: Sequence[Candidate]) -> Task:
        """Who of these goes on to the next rung."""
        rungs = self.protocols.rungs
        ordered = sorted(candidates, key=lambda candidate: candidate.key)
        return self._task(
            "race",
            self.model.sampler,
            {
                "images": rungs[rung].images,
                "top": rungs[-1].images,
                "metrics": list(self.raced),
                "alpha": alpha_of_rung(len(rungs)),
                "candidates": [asdict(candidate) for candidate in ordered],
            },
            resources="score",
            needs=tuple(candidate.key for candidate in ordered),
            label=f"race at {rungs[rung].images} images",
        )

    def explore(self, count: int, generations: Sequence[Generation]) -> Task:
        """What to search next: `count` points, by what is known of all those before."""
        first = sum(map(len, generations)) + 1
        return self._task(
            "explore",
            self.model.sampler,
            {
                "explore": asked(self.model),
                "generation": len(generations),
                "count": count,
                "search": decisive(self.model.grid.expand()[0]),
                "quality": judged_by(self.sweep.objective.quality),
                "calibration": self.protocols.calibration_json,
                "postprocess": self.model.postprocess,
                "macs_convention": self.sweep.macs_convention,
            },
            resources="score",
            options={"generations": [[one.to_json() for one in each] for each in generations]},
            label=f"proposals {first} to {first + count - 1}",
        )

    def latencies(self, way: Way, label: str) -> tuple[Task, ...]:
        """Dense and pruned runs interleaved, alone on the node: a task for each batch size."""
        sizes = zip(self.sweep.latency.batch_size, self.latency_labels(label), strict=True)
        return tuple(
            self.once(("latency", way, size), partial(self._latency, way, size, named))
            for size, named in sizes
        )

    def latency_labels(self, label: str) -> tuple[str, ...]:
        """Name the latency tasks of a point, the one that speeds are compared by first."""
        first, *others = self.sweep.latency.batch_size
        return (f"{label}, latency", *(f"{label}, latency of {size} images" for size in others))

    def _latency(self, way: Way, batch_size: int, label: str) -> Task:
        settings = self.sweep.latency
        cpus = resources_of(self.sweep, "latency", self.facts).cpus
        return self._task(
            "latency",
            way.sampler,
            {
                **self._gates(way),
                "dense_sampler": self._sampler(self.model.sampler),
                "device": self.device,
                "threads": max(1, round(cpus)),
                "attention": "default",  # of diffusers; nothing is compiled
                "compile": "none",
                "batch_size": batch_size,
                "warmup": settings.warmup,
                "max_warmup": settings.max_warmup,
                "min_runs": settings.min_runs,
                "min_seconds": settings.min_seconds,
                "repeat": settings.repeat,
                **({"tile": self.memory.tile} if self.memory.tile else {}),
                "granularity": way.granularity,
                "shown_sha256": self._shown(batch_size),
            },
            resources="latency",
            needs=(self.reference("test").key,),
            options={
                "tries": settings.tries,
                "items_sha256": self.facts.test.sha256,
                **_held(self.memory.fit("latency", batch_size)),
            },
            label=label,
        )

    def _shown(self, images: int) -> str:
        return self.once(("shown", images), lambda: self.facts.test.shown_sha256(images))

    # what every task is made of -------------------------------------------------------------------

    def _batch(self, kind: ResourceKind, split: Split) -> dict[str, Any]:
        fit = self.memory.fit(kind, split)
        return {"batch_size": fit.run.images, **_held(fit)}

    def _ways(self, settings: SearchSettings) -> dict[str, Any]:
        """Return how a search is run so that it fits; nothing where nobody had to decide."""
        fit = self.memory.fit("search", stand_in(self.model, settings))
        if fit.run.checkpoint_calls is None:
            return _held(fit)
        split = fit.run.images if fit.run.images != settings.batch_size else None
        again = fit.run.checkpoint_calls
        return {**_held(fit), "memory": {"images_at_once": split, "checkpoint_calls": again}}

    @cached_property
    def _where(self) -> dict[str, str]:
        places = {"model_folder": self.facts.folder, "model_base": self.facts.base_folder}
        return {name: place for name, place in places.items() if place is not None}

    @cached_property
    def _model(self) -> dict[str, Any]:
        """What decides the model: its weights, not where they lie."""
        model = {
            **self.model.settings.to_json(),
            "resolution": self.facts.height,  # one key, whether the sweep file says it or not
            "weights_sha256": self.facts.weights_sha256,
        }
        return model | {_LOCAL[name]: Path(place).name for name, place in self._where.items()}

    def _sampler(self, sampler: SamplerSettings) -> dict[str, Any]:
        known: dict[str, Any] = self.once(("sampler", sampler), sampler.to_json)
        return known

    def _gates(self, way: Way) -> dict[str, Any]:
        """Return a gate table as inputs have it; most tables extrapolate nothing."""
        bent = {"extrapolation": way.extrapolation} if way.extrapolation else {}
        return {"keep": self._rows(way), **bent}

    def _rows(self, way: Way) -> list[str]:
        rows: list[str] = self.once(("rows", way.keep), lambda: list(way.keep))
        return rows

    def once(self, name: tuple[Any, ...], make: Callable[[], T]) -> T:
        """Return what was made under this name, making it at first: it is the same object."""
        if name not in self._made:
            self._made[name] = make()
        made: T = self._made[name]
        return made

    def _task(
        self,
        kind: TaskKind,
        sampler: SamplerSettings,
        inputs: Mapping[str, Any],
        *,
        resources: ResourceKind,
        label: str,
        scored: bool = False,
        needs: tuple[str, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Task:
        """Return a task. resources: which part of the sweep file says what it takes."""
        taken = self.once(
            ("taken", resources), lambda: resources_of(self.sweep, resources, self.facts)
        )
        decides = {
            "model": self._model,
            "sampler": self._sampler(sampler),
            "versions": numerics_versions(scored=scored),
            **inputs,
        }
        return Task.of_key(
            self._texts.key(kind, decides),
            kind=kind,
            inputs=decides,
            needs=needs,
            options={**(options or {}), **self._where},
            label=f"{self.model.name}: {label}",
            affinity="" if kind in _LIGHT else self._pipeline,
            cpus=taken.cpus,
            gpus=taken.gpus,
            accelerator=taken.accelerator,
            exclusive=kind == "latency",
        )

    @cached_property
    def _pipeline(self) -> str:
        return f"{self.facts.weights_sha256}/{self.model.settings.dtype}"


def _named(images: range) -> str:
    return f"images {images.start} to {images.stop - 1}"


def _of_split(label: str, split: Split) -> str:
    return label if split == "test" else f"{label}, {split}"
