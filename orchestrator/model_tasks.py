"""The tasks of one model: what decides each result (the key), and how it is run (the rest)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from dipgo_core import NUMERICS_VERSION
from dipgo_core.config import SamplerSettings, SearchSettings
from dipgo_core.evaluation.metrics import FEATURE_ROLES, METRICS, Role, roles_of
from dipgo_core.evaluation.protocol import Protocol, Split, largest_kid_subset
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.memory import Fit
from orchestrator.bars import CALIBRATION_METRICS
from orchestrator.facts import ModelFacts, scorer_places
from orchestrator.memory import ModelLoads, ModelMemory
from orchestrator.methods import PointSpec, point_specs, search_label
from orchestrator.racing import Candidate, alpha_of_rung, raced_metrics
from orchestrator.records import Task, TaskKind
from orchestrator.resources import resources_of
from orchestrator.sweep_settings import ResourceKind, SweepFile, SweepModel

#: Libraries that decide images, and those that only decide what images are found to be worth.
_GENERATING = ("torch", "diffusers", "transformers")
_SCORING = ("torchmetrics", "torch-fidelity", "torchvision")

#: What tasks of a kind occupy, of the kinds that a sweep file knows; those of images differ.
_RESOURCES: Final[Mapping[TaskKind, ResourceKind]] = {
    "reference": "reference",
    "images": "evaluate",
    "statistics": "evaluate",
    "search": "search",
    "evaluate": "evaluate",
    "latency": "latency",
    "race": "score",
}

#: The options that say where a model lies here, and what they replace.
_LOCAL: Final = {"model_folder": "id", "model_base": "base"}


@cache
def numerics_versions(kind: TaskKind) -> dict[str, str]:
    """Return the versions that decide a result: ours, and the minor ones of the libraries."""
    names = (*_GENERATING, *_SCORING) if kind in ("evaluate", "statistics") else _GENERATING
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


@dataclass(frozen=True, kw_only=True)
class ModelTasks:
    """Makes the tasks of one model of a sweep.

    device: name of the device that latencies are measured on.
    """

    sweep: SweepFile
    model: SweepModel
    facts: ModelFacts
    device: str

    @cached_property
    def protocol(self) -> Protocol:
        """How points are measured on the test set, at the top rung of a race. Metrics come in the
        order of their registry: the one in which a sweep names them decides no figure."""
        metrics = tuple(name for name in METRICS if name in self.model.evaluate.metrics)
        return self._test_protocol(self.model.evaluate.images, metrics)

    @cached_property
    def protocols(self) -> tuple[Protocol, ...]:
        """The protocol of each rung, the top one last; lower ones leave FID out."""
        metrics = raced_metrics(self.protocol.metrics)
        lower = (self._test_protocol(n, metrics) for n in self.model.evaluate.rungs[:-1])
        return (*lower, self.protocol)

    def _test_protocol(self, images: int, metrics: tuple[str, ...]) -> Protocol:
        return replace(
            self._images_protocol("test"),
            images=images,
            metrics=metrics,
            scorers={role: self.facts.scorers[role] for role in roles_of(metrics)},
            reference=self.facts.reference,
            kid_subset_size=largest_kid_subset(images) if "kid" in metrics else 0,
        )

    @cached_property
    def calibration_protocol(self) -> Protocol:
        """How points are measured on calibration prompts, where every choice is made."""
        wanted = self.protocol.metrics
        metrics = tuple(m for m in CALIBRATION_METRICS if m == "psnr" or m in wanted)
        return replace(
            self._images_protocol("calibration"),
            metrics=metrics,
            scorers={role: self.protocol.scorers[role] for role in roles_of(metrics)},
        )

    @cached_property
    def memory(self) -> ModelMemory:
        """How tasks are run so that they fit on their GPU."""
        return ModelLoads(self.sweep, self.model, self.facts).memory

    @cached_property
    def _protocols_json(self) -> tuple[dict[str, Any], ...]:
        return tuple(protocol.to_json() for protocol in self.protocols)

    @cached_property
    def calibration_protocol_json(self) -> dict[str, Any]:
        return self.calibration_protocol.to_json()

    @cached_property
    def protocol_hash(self) -> str:
        return self.protocol.hash

    def _images_protocol(self, split: Split) -> Protocol:
        """Return what decides the images alone: no scorers, no metrics."""
        test = split == "test"
        items = self.facts.test if test else self.facts.calibration
        source = self.model.evaluate if test else self.model.calibration
        return Protocol(
            split=split,
            items_sha256=items.sha256,
            num_items=items.count,
            images=source.images,
            seed=source.seed,
            height=self.facts.height,
            width=self.facts.width,
            sampler=self.model.sampler.to_json(),
            dtype=self.model.settings.dtype,
            metrics=(),
            tile=self.memory.tile,
        )

    @cached_property
    def measures_latency(self) -> bool:
        return "latency" in self.model.evaluate.metrics

    @cached_property
    def specs(self) -> tuple[PointSpec, ...]:
        """Every point of the model."""
        return tuple(point_specs(self.model))

    def reference(self, split: Split) -> Task:
        """The dense model: block graph, images, and final latents on the calibration split."""
        return self._references[split]

    @cached_property
    def _references(self) -> dict[Split, Task]:
        splits: tuple[Split, Split] = ("calibration", "test")
        return {split: self._reference(split) for split in splits}

    def _reference(self, split: Split) -> Task:
        protocol = self._images_protocol(split)
        return self._task(
            "reference",
            self.model.sampler,
            {"protocol": protocol.to_json()},
            options=self._batch("reference", split),
            label=f"dense images, {split}",
        )

    @cached_property
    def statistics(self) -> Mapping[Role, Task]:
        """Features of the reference images, by role; those of a statistics file need no task."""
        if self.facts.reference.startswith("statistics:"):
            return {}
        known = {role: one for role, one in self.protocol.scorers.items() if role in FEATURE_ROLES}
        return {role: self._statistics(role, scorer) for role, scorer in known.items()}

    def _statistics(self, role: Role, scorer: Scorer) -> Task:
        """The key of a folder's features says nothing of the model: all models share them."""
        dense = self.facts.reference == "dense"
        task = self._task(
            "statistics",
            self.model.sampler,
            {"images": self.facts.reference, "role": role, "scorer": scorer.to_json()},
            needs=(self.reference("test").key,) if dense else (),
            options={
                **self._batch("evaluate", "test"),
                "scorer": scorer_places(self.model)[role],
                "reference": self.facts.reference_value,
            },
            label=f"reference features, {scorer.id}",
        )
        if dense:
            protocol = self._images_protocol("test").to_json()
            return replace(task, inputs={**task.inputs, "protocol": protocol})
        shared = {k: v for k, v in task.inputs.items() if k not in ("model", "sampler")}
        return replace(task, inputs=shared, affinity="")

    def search(self, settings: SearchSettings) -> Task:
        """One search; it serves every target."""
        return next(task for known, task in self._searches if known == settings)

    @cached_property
    def _searches(self) -> list[tuple[SearchSettings, Task]]:
        found: list[tuple[SearchSettings, Task]] = []
        for spec in self.specs:
            if spec.search is not None and all(known != spec.search for known, _ in found):
                found.append((spec.search, self._search(spec.search)))
        return found

    def _search(self, settings: SearchSettings) -> Task:
        calibration = self._images_protocol("calibration").to_json()
        return self._task(
            "search",
            self.model.sampler,
            {"search": settings.to_json(), "calibration": calibration},
            needs=(self.reference("calibration").key,),
            options=self._ways(settings),
            label=search_label(settings),
        )

    def evaluate(
        self,
        sampler: SamplerSettings,
        granularity: str,
        keep: Sequence[str],
        split: Split,
        label: str,
        *,
        rung: int = -1,
        continues: str | None = None,
    ) -> Task:
        """Images and figures of one gate table; the same table is never evaluated twice.

        rung: index into `protocols`, on the test split. continues: key of an evaluation of the same
        table with another number of images, whose images are not made again.
        """
        test = split == "test"
        protocol = self._protocols_json[rung] if test else self.calibration_protocol_json
        statistics = {
            role: task.key for role, task in self.statistics.items() if role in protocol["scorers"]
        }
        return self._task(
            "evaluate",
            sampler,
            {
                "keep": list(keep),
                "protocol": protocol,
                "granularity": granularity,
                "macs_convention": self.sweep.macs_convention,
            },
            needs=(
                self.reference(split).key,
                *statistics.values(),
                *([] if continues is None else [continues]),
            ),
            options={
                **self._batch("evaluate", split),
                "scorers": scorer_places(self.model),
                "reference": self.facts.reference_value,
                "statistics": statistics,
                **({} if continues is None else {"continues": continues}),
            },
            label=label if test else f"{label}, calibration",
        )

    @cached_property
    def raced(self) -> tuple[str, ...]:
        """Metrics whose fronts a race must keep: those asked for, else the sweep's own quality."""
        measured = raced_metrics(self.protocol.metrics)
        quality = self.sweep.objective.quality
        own = "kid" if quality == "fid" else quality
        return self.model.evaluate.race or ((own,) if own in measured else measured)

    def race(self, rung: int, candidates: Sequence[Candidate]) -> Task:
        """Who of these goes on to the next rung."""
        protocol = self.protocols[rung]
        ordered = sorted(candidates, key=lambda candidate: candidate.key)
        return self._task(
            "race",
            self.model.sampler,
            {
                "images": protocol.images,
                "top": self.protocol.images,
                "metrics": list(self.raced),
                "alpha": alpha_of_rung(len(self.protocols)),
                "candidates": [asdict(candidate) for candidate in ordered],
            },
            needs=tuple(candidate.key for candidate in ordered),
            label=f"race at {protocol.images} images",
        )

    def latencies(
        self, sampler: SamplerSettings, granularity: str, keep: Sequence[str], label: str
    ) -> tuple[Task, ...]:
        """Dense and pruned runs interleaved, alone on the node: a task for each batch size."""
        sizes = zip(self.sweep.latency.batch_size, self.latency_labels(label), strict=True)
        return tuple(
            self._latency(sampler, granularity, keep, size, named) for size, named in sizes
        )

    def latency_labels(self, label: str) -> tuple[str, ...]:
        """Name the latency tasks of a point, the one that speeds are compared by first."""
        first, *others = self.sweep.latency.batch_size
        return (f"{label}, latency", *(f"{label}, latency of {size} images" for size in others))

    def _latency(
        self,
        sampler: SamplerSettings,
        granularity: str,
        keep: Sequence[str],
        batch_size: int,
        label: str,
    ) -> Task:
        settings = self.sweep.latency
        task = self._task(
            "latency",
            sampler,
            {
                "keep": list(keep),
                "dense_sampler": self.model.sampler.to_json(),
                "device": self.device,
                "threads": max(1, round(resources_of(self.sweep, "latency", self.facts).cpus)),
                "attention": "default",  # of diffusers; nothing is compiled
                "compile": "none",
                "batch_size": batch_size,
                "warmup": settings.warmup,
                "max_warmup": settings.max_warmup,
                "min_runs": settings.min_runs,
                "min_seconds": settings.min_seconds,
                "repeat": settings.repeat,
                **({"tile": self.memory.tile} if self.memory.tile else {}),
                "granularity": granularity,
                "shown_sha256": self.facts.test.shown_sha256(batch_size),
            },
            needs=(self.reference("test").key,),
            options={
                "tries": settings.tries,
                "items_sha256": self.facts.test.sha256,
                **_held(self.memory.fit("latency", batch_size)),
            },
            label=label,
        )
        return replace(task, exclusive=True)

    def _batch(self, kind: TaskKind, split: Split) -> dict[str, Any]:
        fit = self.memory.fit(kind, split)
        return {
            "batch_size": fit.run.images,
            "images_per_shard": self.sweep.resources.images_per_shard,
            **_held(fit),
        }

    def _ways(self, settings: SearchSettings) -> dict[str, Any]:
        """Return how a search is run so that it fits; nothing where nobody had to decide."""
        fit = self.memory.fit("search", settings)
        if fit.run.checkpoint_calls is None:
            return _held(fit)
        split = fit.run.images if fit.run.images != settings.batch_size else None
        again = fit.run.checkpoint_calls
        return {**_held(fit), "memory": {"images_at_once": split, "checkpoint_calls": again}}

    def _where(self) -> dict[str, str]:
        places = {"model_folder": self.facts.folder, "model_base": self.facts.base_folder}
        return {name: place for name, place in places.items() if place is not None}

    def _task(
        self,
        kind: TaskKind,
        sampler: SamplerSettings,
        inputs: Mapping[str, Any],
        *,
        label: str,
        needs: tuple[str, ...] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Task:
        resources = resources_of(self.sweep, _RESOURCES[kind], self.facts)
        model = {
            **self.model.settings.to_json(),
            "resolution": self.facts.height,  # one key, whether the sweep file says it or not
            "weights_sha256": self.facts.weights_sha256,
        }
        where = self._where()
        for name, place in where.items():  # what lies where decides nothing, its weights do
            model[_LOCAL[name]] = Path(place).name
        return Task(
            kind=kind,
            inputs={
                "model": model,
                "sampler": sampler.to_json(),
                "versions": numerics_versions(kind),
                **inputs,
            },
            needs=needs,
            options={**(options or {}), **where},
            label=f"{self.model.name}: {label}",
            affinity=f"{self.facts.weights_sha256}/{self.model.settings.dtype}",
            cpus=resources.cpus,
            gpus=resources.gpus,
            accelerator=resources.accelerator,
        )
