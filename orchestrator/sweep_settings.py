"""SweepFile and its parts: a sweep with every default filled in. Frozen values, no torch, no YAML.

`orchestrator.sweep_file.load_sweep` is the one place that builds them from a file.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dipgo_core.config import (
    Convention,
    LossSettings,
    ModelSettings,
    Postprocess,
    SamplerSettings,
    SearchSettings,
)
from dipgo_core.families import Scorers
from orchestrator.records import canonical, content_key
from orchestrator.secrets import redact

SCHEMA_VERSION = 1

Metric = Literal[
    "fid", "kid", "cmmd", "clip", "image_reward", "psnr", "ssim", "lpips", "dino", "latency"
]
PromptKind = Literal["bundled", "file", "hub", "labels"]
ResourceKind = Literal["reference", "search", "evaluate", "latency", "score"]
ReferenceKind = Literal["dense", "folder", "statistics"]
Spacing = Literal["leading", "trailing"]
Solver = Literal["own", "dpm++2m"]
KneeRule = Literal["beats_trivial", "any"]
ExploreSampler = Literal["tpe", "nsga2", "random"]
DimensionKind = Literal["uniform", "loguniform", "int", "logint", "choice"]
Axes = Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True, kw_only=True)
class PromptSource:
    """Where prompts or class labels come from.

    kind bundled: `value` is the split (calibration, test). file: `value` is a path that opens from
    the current folder. hub: `value` is the data set's id, `file` one file of it. labels: the
    classes of the model, `rows` of them spread evenly, or just those of `labels`.
    """

    kind: PromptKind
    value: str = ""
    file: str | None = None
    column: str | None = None
    rows: int | None = None  # None: all of them
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    labels: tuple[int, ...] = ()

    @property
    def source(self) -> str | dict[str, Any]:
        """What ``dipgo_core.evaluation.prompts.read_items`` reads; not for kind labels."""
        if self.kind == "bundled":
            return f"bundled:{self.value}"
        names = ("file", "column", "rows", "split", "config", "revision")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return {self.kind: self.value, **given}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What searches look at, and where trivial baselines are chosen; never the test set."""

    prompts: PromptSource
    images: int = 32
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What FID and KID compare with. `value`: a folder, a statistics file, or ``bundled``.

    extractor, resize: what made a .npz, which does not tell; "" for what tells it itself.
    """

    kind: ReferenceKind = "dense"
    value: str = ""
    extractor: str = ""
    resize: str = ""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """How every point of a model is measured. Scorers: bundled names, hub ids or local paths.

    rungs: image counts of a race, rising, the last of them `images`; empty where nothing is raced.
    race: metrics whose fronts a race must keep; empty: that of the sweep's objective.
    """

    prompts: PromptSource
    images: int
    scorers: Scorers
    reference: Reference = field(default_factory=Reference)
    metrics: tuple[Metric, ...] = ("fid", "kid", "clip", "psnr", "ssim", "latency")
    seed: int = 0
    batch_size: int = 16
    images_per_prompt: int | None = None  # None: as often as needed
    rungs: tuple[int, ...] = ()
    race: tuple[Metric, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One trivial way to spend the compute of a target.

    draws: independent random gate tables a target (`random` only, else 0).
    spacing: timestep spacings tried (`few_steps` only, else empty). solver: noise schedulers tried
    (`few_steps`, `ays`). schedules: how many a target (`deepcache` only, else none).
    """

    name: str
    draws: int = 0
    spacing: tuple[Spacing, ...] = ()
    solver: tuple[Solver, ...] = ("own",)
    schedules: int = 0


@dataclass(frozen=True, kw_only=True)
class SearchGrid:
    """The axes of a model's searches; a value of one entry is an axis of length one.

    axes: every field of SearchSettings but `loss`. losses: one mapping per entry of `search.loss`,
    each with the axes of LossSettings; their grids are laid end to end.
    """

    axes: Axes
    losses: tuple[Axes, ...] = ({},)

    def __len__(self) -> int:
        return _size(self.axes) * sum(_size(loss) for loss in self.losses)

    def expand(self) -> tuple[SearchSettings, ...]:
        """Return one SearchSettings per point of the grid, the last axis varying fastest."""
        losses = [LossSettings(**values) for loss in self.losses for values in _product(loss)]
        return tuple(
            SearchSettings(loss=loss, **values) for loss in losses for values in _product(self.axes)
        )


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One thing that an exploration varies: numbers from `low` to `high`, or `choices`.

    kind int, logint: whole numbers. loguniform, logint: spread evenly over orders of magnitude.
    """

    kind: DimensionKind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExploreStop:
    """An exploration ends when its hypervolume has grown by less than a share of `epsilon` for
    `gpu_hours` of searching (hours, where searches take no GPU)."""

    epsilon: float = 0.01
    gpu_hours: float


@dataclass(frozen=True, kw_only=True)
class Explore:
    """Searches that are proposed one batch after another, by what is known of the ones before.

    points: how many at most. over: settings of a search, fields of its loss as ``loss.alpha``, and
    `target`, which is one of the model's targets where it is not given.
    """

    sampler: ExploreSampler = "tpe"
    points: int
    over: Mapping[str, Dimension]
    batch: int = 8
    seed: int = 0
    stop: ExploreStop | None = None


@dataclass(frozen=True, kw_only=True)
class SweepModel:
    """One model with one sampler, and everything to be done with it."""

    name: str
    family: str
    settings: ModelSettings
    sampler: SamplerSettings
    targets: tuple[float, ...]
    baselines: tuple[Baseline, ...]
    grid: SearchGrid
    calibration: Calibration
    evaluate: EvaluateSettings
    postprocess: Postprocess = "budget"
    explore: Explore | None = None  # in place of the grid, which then has one entry

    def searches(self) -> tuple[SearchSettings, ...]:
        """Return every search of the grid; each serves all targets.

        Of an exploration: what its searches have in common, once for each granularity.
        """
        searches = self.grid.expand()
        if self.explore is None or "granularity" not in self.explore.over:
            return searches
        varied = self.explore.over["granularity"].choices
        return tuple(replace(one, granularity=name) for one in searches for name in varied)


@dataclass(frozen=True, kw_only=True)
class TaskResources:
    """What one task occupies on its node (`orchestrator.resources` works it out).

    gpu_memory_gb: what it may use of a GPU's memory, in 10^9 bytes; None: of the GPU that is there,
    and without one nothing is made to fit. accelerator: Ray's name of the GPU type; None: any.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    gpu_memory_gb: float | None = None
    accelerator: str | None = None


@dataclass(frozen=True, kw_only=True)
class AskedResources:
    """What a sweep file says of `TaskResources`; None: estimated by the size of the model."""

    cpus: float | None = None
    gpus: float | None = None
    gpu_memory_gb: float | None = None
    accelerator: str | None = None


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What tasks occupy, by what they do, and how many images one shard of a run has.

    reference: images of the dense run. evaluate: images of the points, and features of references.
    score: figures of images that others have made, and races.
    """

    reference: AskedResources = field(default_factory=AskedResources)
    search: AskedResources = field(default_factory=AskedResources)
    evaluate: AskedResources = field(default_factory=AskedResources)
    latency: AskedResources = field(default_factory=AskedResources)
    score: AskedResources = field(default_factory=AskedResources)
    images_per_shard: int = 500


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """How latency is measured: dense and pruned runs interleaved, alone on the node.

    batch_size: images a run; speeds are compared at the first one, throughput is measured at all.
    warmup, max_warmup: pairs of runs thrown away, at least and at most; 0: none at all.
    min_runs, min_seconds: pairs of runs that count, and how long they take together, at least.
    tries: how often a measurement that something disturbed is made, at most.
    repeat: number of the series of measurements; with another one everything is measured again.
    """

    batch_size: tuple[int, ...] = (1,)
    warmup: int = 2
    max_warmup: int = 20
    min_runs: int = 10
    min_seconds: float = 5.0
    tries: int = 3
    repeat: int = 0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The headline pair; fronts are drawn for every quality metric anyway.

    knee: which points of a front may be its knee: searched ones that surely beat the best trivial
    baseline at the same compute, or any.
    """

    speed: Literal["latency", "macs"] = "latency"
    quality: Metric = "clip"
    knee: KneeRule = "beats_trivial"


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """`uri` None: the environment's MLFLOW_TRACKING_URI, else ``sqlite:///mlflow.db``."""

    experiment: str
    uri: str | None = None


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Where a sweep stops starting tasks; None = no limit.

    gpu_hours, usd: of the sweep, whichever run of it they were spent in. wall_hours: of one run.
    usd_per_gpu_hour: what makes dollars of GPU hours; there whenever `usd` is.
    """

    gpu_hours: float | None = None
    wall_hours: float | None = None
    usd: float | None = None
    usd_per_gpu_hour: float | None = None


@dataclass(frozen=True, kw_only=True)
class SweepFile:
    """A whole sweep, checked and resolved."""

    name: str
    models: tuple[SweepModel, ...]
    objective: Objective = field(default_factory=Objective)
    resources: Resources = field(default_factory=Resources)
    latency: LatencySettings = field(default_factory=LatencySettings)
    tracking: Tracking
    storage: str = "./.dipgo"
    budget: Budget = field(default_factory=Budget)
    macs_convention: Convention = "all"
    allow_unpinned: bool = False
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return the resolved file as JSON types, keys sorted, without the password of a URI."""
        uri = self.tracking.uri
        shown = replace(self.tracking, uri=None if uri is None else redact(uri))
        resolved = canonical(asdict(replace(self, tracking=shown)))
        assert isinstance(resolved, dict)
        return resolved

    @property
    def digest(self) -> str:
        """SHA-256 of the resolved file; comments, order and spelled-out defaults do not matter."""
        return content_key(self.to_json())


def _size(axes: Axes) -> int:
    return math.prod(len(values) for values in axes.values())


def _product(axes: Axes) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))
