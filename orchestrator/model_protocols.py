"""The protocols of one model: how its points are measured, on which images, at every rung."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from dipgo_core.evaluation.metrics import METRICS, roles_of
from dipgo_core.evaluation.protocol import Protocol, Split, largest_kid_subset
from orchestrator.bars import CALIBRATION_METRICS
from orchestrator.facts import ModelFacts
from orchestrator.racing import raced_metrics
from orchestrator.sweep_settings import SweepModel

JSON = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ModelProtocols:
    """Protocols of one model. tile: side of the tiles that its images are decoded in."""

    model: SweepModel
    facts: ModelFacts
    tile: int | None

    @cached_property
    def top(self) -> Protocol:
        """How points are measured on the test set, at the top rung of a race. Metrics come in the
        order of their registry: the one in which a sweep names them decides no figure."""
        metrics = tuple(name for name in METRICS if name in self.model.evaluate.metrics)
        return self._test(self.model.evaluate.images, metrics)

    @cached_property
    def rungs(self) -> tuple[Protocol, ...]:
        """The protocol of each rung, the top one last; lower ones leave FID out."""
        metrics = raced_metrics(self.top.metrics)
        lower = (self._test(n, metrics) for n in self.model.evaluate.rungs[:-1])
        return (*lower, self.top)

    def _test(self, images: int, metrics: tuple[str, ...]) -> Protocol:
        return replace(
            self.images("test"),
            images=images,
            metrics=metrics,
            scorers={role: self.facts.scorers[role] for role in roles_of(metrics)},
            reference=self.facts.reference,
            kid_subset_size=largest_kid_subset(images) if "kid" in metrics else 0,
        )

    @cached_property
    def calibration(self) -> Protocol:
        """How points are measured on calibration prompts, where every choice is made."""
        wanted = self.top.metrics
        metrics = tuple(m for m in CALIBRATION_METRICS if m == "psnr" or m in wanted)
        return replace(
            self.images("calibration"),
            metrics=metrics,
            scorers={role: self.top.scorers[role] for role in roles_of(metrics)},
        )

    def images(self, split: Split) -> Protocol:
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
            tile=self.tile,
        )

    @cached_property
    def by_hash(self) -> dict[str, JSON]:
        """Every protocol that figures of this model carry."""
        return {one.hash: one.to_json() for one in (*self.rungs, self.calibration)}

    # JSON that many tasks share: always the same object ---------------------------------------

    @cached_property
    def rungs_json(self) -> tuple[JSON, ...]:
        return tuple(protocol.to_json() for protocol in self.rungs)

    @cached_property
    def calibration_json(self) -> JSON:
        return self.calibration.to_json()

    @cached_property
    def images_json(self) -> dict[Split, JSON]:
        """Return the protocol of a split's images."""
        splits: tuple[Split, Split] = ("calibration", "test")
        return {split: self.images(split).to_json() for split in splits}

    @cached_property
    def endless_json(self) -> dict[Split, JSON]:
        """What decides an image of a split: the protocol without the number of images."""
        return {
            split: {name: value for name, value in known.items() if name != "images"}
            for split, known in self.images_json.items()
        }
