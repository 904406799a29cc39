"""DiT: a transformer conditioned on class labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.config import SamplerSettings
from dipgo_core.families.family import Config, Family, KnownModel, Meta
from dipgo_core.families.schedulers import UNSCALED
from dipgo_core.families.scorers import BY_CLASS, TINY

_SAMPLER: Final = SamplerSettings(scheduler="ddim", steps=250, guidance_scale=4.0)


def _inputs(config: Config, side: int, tokens: int) -> Mapping[str, Any]:
    return {
        "hidden_states": Meta((1, config["in_channels"], side, side)),
        "timestep": Meta((1,)),
        "class_labels": Meta((1,), "int64"),
    }


FAMILY: Final = Family(
    name="dit",
    pipelines=("DiTPipeline",),
    denoiser_attribute="transformer",
    denoiser="DiTTransformer2DModel",
    blocks=("transformer_blocks.*",),
    layers=("transformer_blocks.*.attn1", "transformer_blocks.*.ff"),
    streams={"transformer_blocks.*": ("hidden_states",)},
    conditioning="label",
    tokens="none",
    inputs=_inputs,
    size_multiple=None,
    schedulers=UNSCALED,
    custom=(),
    conditional="first",
    sampler=_SAMPLER,
    resolution=256,
    scorers=BY_CLASS,
)

KNOWN_MODELS: Final = (
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
        tokens=0,
        resolution=32,
        num_blocks=11,
        num_layers=21,
        macs=33_734_656,
        macs_paper=33_079_296,
        cache_bytes=41_472,
        cache_bytes_layers=82_432,
        sampler=SamplerSettings(scheduler="ddim", steps=10, guidance_scale=3.0),
        scorers=TINY,
    ),
    KnownModel(
        id="facebook/DiT-XL-2-256",
        family="dit",
        config={"num_attention_heads": 16, "out_channels": 8, "num_layers": 28, "sample_size": 32},
        tokens=0,
        resolution=256,
        num_blocks=29,
        num_layers=57,
        macs=118_666_838_016,
        macs_paper=114_438_979_584,
        cache_bytes=16_531_456,
        cache_bytes_layers=33_046_528,
        sampler=_SAMPLER,
        scorers=BY_CLASS,
    ),
)
