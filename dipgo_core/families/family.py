"""Family and KnownModel: what is said of models before any weights are loaded. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dipgo_core.config import Convention, Granularity, SamplerSettings
from dipgo_core.families.schedulers import Schedule, plain_schedule
from dipgo_core.graph import Reuse

Conditioning = Literal["prompt", "label"]

#: How many conditioning tokens a call has: the tokenizer's fixed length, the stock call's
#: `max_sequence_length`, both (text encoders side by side), or none.
Tokens = Literal["tokenizer", "sequence", "tokenizer+sequence", "none"]

#: The config of a denoiser, every field.
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Meta:
    """One tensor among the arguments of a forward: shape and type, no values."""

    shape: tuple[int, ...]
    dtype: Literal["float32", "int64"] = "float32"


#: Gives the denoiser's arguments of one batch-1 call: config, side of the latents, tokens -> Meta
#: (also nested in dicts), or the values of arguments that are no tensors.
Inputs = Callable[[Config, int, int], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Scorers:
    """Networks that judge the images: hub ids, local folders, or bundled names.

    features: torch-fidelity extractor of FID and KID. clip, image_reward: None where prompts mean
    nothing. cmmd: CLIP whose image features CMMD compares; lpips, dino: of the paired distances.
    """

    features: str
    clip: str | None
    cmmd: str = "timm/vit_large_patch14_clip_336.openai"  # the paper's network, in safetensors
    lpips: str = "lpips-alex"
    dino: str = "facebook/dinov2-base"
    image_reward: str | None = "THUDM/ImageReward"


def sample_size(config: Config) -> int:
    """Return the side of the latents that a model is made for: most configs say it."""
    return int(config["sample_size"])


def any_size(config: Config) -> int | None:
    """Return that images of any size can be made: positions are computed, not looked up."""
    return None


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a denoiser class, the pipelines around it, and defaults.

    pipelines: classes of diffusers; the first `searchable` make images from a prompt or label
    alone, in the others a SubNet runs as well. blocks, layers: fnmatch patterns of module names
    inside the denoiser, at each granularity; no blocks: entries of its module lists, found in a
    call of the pipeline. streams: by such a pattern, the forward's argument that each output
    continues, in the order of the outputs; modules of other patterns are reused by output, not by
    residual.
    call_options: further arguments of the stock call. schedulers: the noise schedulers that fit.
    custom: arguments of the stock call for schedules of one's own. schedule: what the stock call
    hands to ``set_timesteps``. latent_side: of what the model is made for; size_multiple: of the
    image's side in pixels, None where the pipeline takes no size. largest: that side at most, None
    without a bound. conditional: which half of a guided call's batch has the prompt or label, None
    where guidance doubles no batch. ays: the Align-Your-Steps list for the family's noise schedule.
    """

    name: str
    pipelines: tuple[str, ...]
    searchable: int = 1
    denoiser_attribute: str
    denoiser: str
    blocks: tuple[str, ...]
    layers: tuple[str, ...]
    streams: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conditioning: Conditioning = "prompt"
    tokens: Tokens = "tokenizer"
    call_options: Mapping[str, Any] = field(default_factory=dict)
    inputs: Inputs
    latent_side: Callable[[Config], int] = sample_size
    size_multiple: int | None = 8
    largest: Callable[[Config], int | None] = any_size
    schedulers: tuple[str, ...]
    custom: tuple[Literal["timesteps", "sigmas"], ...] = ("timesteps", "sigmas")
    schedule: Schedule = plain_schedule
    conditional: Literal["first", "last"] | None = None
    ays: tuple[int, ...] | None = None
    sampler: SamplerSettings
    resolution: int  # pixels
    scorers: Scorers

    @property
    def pipeline(self) -> str:
        """The class that makes images from a prompt or label."""
        return self.pipelines[0]

    @property
    def reuse(self) -> Reuse:
        """How the family's blocks are reused."""
        residual = any(pattern in self.streams for pattern in self.blocks)
        return Reuse.RESIDUAL if residual else Reuse.OUTPUT

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """At which its models can be gated."""
        return ("block", "layer") if self.layers else ("block",)

    def patterns(self, granularity: Granularity) -> tuple[str, ...]:
        return self.blocks if granularity == "block" else self.layers


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """Facts of one model: enough to build its denoiser on the meta device and to plan a sweep.

    config: arguments of the denoiser's class that differ from its defaults. pipeline: class of
    diffusers; "" for the family's first. macs, macs_paper: of one batch-1 forward, with and without
    attention products. num_blocks, num_layers: gates a call at either granularity, the denoiser
    itself included. cache_bytes, cache_bytes_layers: of all their outputs of one batch-1 forward in
    16 bit, the most that a SubNet keeps at a time (twice that with guidance, which doubles the
    batch). base: where the rest of the pipeline comes from, if the id holds a denoiser alone.
    """

    id: str
    family: str
    pipeline: str = ""
    config: Mapping[str, Any]
    resolution: int
    num_blocks: int
    num_layers: int
    macs: int
    macs_paper: int
    cache_bytes: int
    cache_bytes_layers: int
    tokens: int = 77
    call_options: Mapping[str, Any] = field(default_factory=dict)
    prediction_type: Literal["epsilon", "v_prediction", "flow"] = "epsilon"
    sampler: SamplerSettings
    scorers: Scorers
    bundled: bool = False
    base: str = ""
    note: str = field(default="", compare=False)

    def macs_of(self, convention: Convention) -> int:
        return self.macs if convention == "all" else self.macs_paper

    def gates_of(self, granularity: Granularity) -> int:
        """Gates a call, the denoiser itself included."""
        return self.num_blocks if granularity == "block" else self.num_layers

    def cache_bytes_of(self, granularity: Granularity) -> int:
        return self.cache_bytes if granularity == "block" else self.cache_bytes_layers
