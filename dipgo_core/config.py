"""Resolved settings of one model, sampler, search and evaluation: frozen values, no torch.

The sweep file's grid (lists as axes) lives in the orchestrator; here every value is one value.
``to_json`` of each is canonical input to a task's content key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from dipgo_core.errors import ConfigError

DType = Literal["float32", "float16", "bfloat16"]
Convention = Literal["all", "paper"]
Postprocess = Literal["budget", "paper", "released"]
Encoder = Literal["attention", "linear", "none"]
Granularity = Literal["block", "layer"]
Objective = Literal["latent", "pixel"]
Start = Literal["keep", "random", "uniform"]
Sampling = Literal["none", "gumbel"]
Spacing = Literal["leading", "trailing", "linspace"]

CONSISTENCY_LOSSES = ("ssim", "l1", "l2")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which weights, in which precision, at which image size.

    `id` is a hub id, a local folder, a file of safetensors or a bundled name. resolution: side of
    the images in pixels; None: the model's own. base: folder or hub id (``owner/name@commit``) of
    the model whose configs and tokenizers a file is loaded with, or whose denoiser `id` replaces.
    """

    id: str
    revision: str | None = None
    dtype: DType = "float32"
    resolution: int | None = None
    base: str | None = None

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise ConfigError(f"resolution must be at least 1 pixel, got {self.resolution}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Noise scheduler, number of steps and guidance of one sampling run.

    `spacing` None keeps the model's own timestep spacing. timesteps, sigmas: a schedule of one's
    own, one entry a step, falling; at most one of the two, and without `spacing`. guidance_calls:
    how many calls have guidance, the first ones; None: all of them.
    """

    scheduler: str
    steps: int
    guidance_scale: float
    spacing: Spacing | None = None
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    guidance_calls: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"sampler.steps must be at least 1, got {self.steps}")
        if self.guidance_calls is not None and (self.guidance_calls < 0 or not self.guided):
            raise ConfigError(
                "sampler.guidance_calls counts calls from 0 on, of a sampler whose guidance_scale "
                f"is above 1, got {self.guidance_calls} at {self.guidance_scale:g}"
            )
        given = [name for name in ("spacing", "timesteps", "sigmas") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"sampler.{given[0]} and sampler.{given[1]} exclude each other")
        for name in ("timesteps", "sigmas"):
            values = getattr(self, name)
            if values is None:
                continue
            object.__setattr__(self, name, tuple(values))  # JSON has lists
            if len(values) != self.steps:
                raise ConfigError(
                    f"sampler.{name} needs one entry a step: steps is {self.steps}, got "
                    f"{len(values)}"
                )

    @property
    def guided(self) -> bool:
        """Whether the scale asks for guidance at all: stock calls have it above 1."""
        return self.guidance_scale > 1

    @property
    def custom(self) -> dict[str, list[float]]:
        """The schedule of one's own, as the argument of a stock call; empty without one."""
        given = {"timesteps": self.timesteps, "sigmas": self.sigmas}
        return {name: list(values) for name, values in given.items() if values is not None}

    def to_json(self) -> dict[str, Any]:
        """Return the fields; later ones only where given, so that keys stay as they were."""
        later = {} if self.guidance_calls is None else {"guidance_calls": self.guidance_calls}
        fields = asdict(self)
        first = ("scheduler", "steps", "guidance_scale", "spacing")
        return {name: fields[name] for name in first} | self.custom | later


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """L = sum_k weight_k f_k(x0_pruned, x0_full) + alpha * sparsity, while compute ratio > tau.

    Source: arXiv 2410.16942, section 3. `gamma`: weight gates by the MACs share they save.
    """

    consistency: Mapping[str, float] = field(default_factory=lambda: {"ssim": 1.0})
    alpha: float = 1.0
    tau: float = 0.2
    gamma: bool = True

    def __post_init__(self) -> None:
        for name, weight in self.consistency.items():
            if name not in CONSISTENCY_LOSSES:
                raise ConfigError(
                    f"loss.consistency knows {', '.join(CONSISTENCY_LOSSES)}, got {name!r}"
                )
            if weight < 0:
                raise ConfigError(f"loss.consistency.{name} must not be negative, got {weight}")
        if not any(self.consistency.values()):
            raise ConfigError("loss.consistency needs at least one positive weight")
        if self.alpha < 0:
            raise ConfigError(f"loss.alpha must not be negative, got {self.alpha}")
        if not 0 <= self.tau < 1:
            raise ConfigError(f"loss.tau must be in [0, 1), got {self.tau}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """One search. Defaults are the paper's, except `steps`, which is the released scripts'.

    Of searches that run candidates: samples, calibration images a candidate is run on at first;
    effort, what they may spend on a target, in dense runs of one image (a step of the paper's
    search costs about five of them, so 500 steps 2,500); objective, where the distance to the dense
    run is taken; extrapolate, whether skipped calls may extrapolate (`GateTable`). staleness:
    longest age, in calls, at which the error of a reuse is measured.

    Of searches by gradient: start, the gates they begin with (all kept, each by a coin, or every
    other call whole); sampling, whether gates are drawn from their probabilities in training.
    """

    strategy: str = "dipgo"
    loss: LossSettings = field(default_factory=LossSettings)
    steps: int = 500
    granularity: Granularity = "block"
    seed: int = 0
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 0.1
    warmup_steps: int = 10
    weight_decay: float = 1e-4
    encoder: Encoder = "attention"
    query_dim: int = 512
    start: Start = "keep"
    sampling: Sampling = "none"
    samples: int = 8
    effort: int = 125
    objective: Objective = "pixel"
    staleness: int = 4
    extrapolate: bool = True

    def __post_init__(self) -> None:
        whole = ("steps", "batch_size", "accumulation", "query_dim")
        for name in (*whole, "samples", "effort", "staleness"):
            if getattr(self, name) < 1:
                raise ConfigError(f"search.{name} must be at least 1, got {getattr(self, name)}")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
