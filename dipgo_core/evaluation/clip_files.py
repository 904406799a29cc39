"""What a CLIP that transformers saved must hold besides its config. No torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

_LAYER: Final = (
    "layer_norm1",
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
    "self_attn.k_proj",
    "self_attn.out_proj",
    "self_attn.q_proj",
    "self_attn.v_proj",
)
_DEFAULT_LAYERS: Final = 12
_NORMS: Final = {
    "text": ("final_layer_norm",),
    "vision": ("pre_layrnorm", "post_layernorm"),
}
_EMBEDDINGS: Final = {
    "text": ("position_embedding.weight", "token_embedding.weight"),
    "vision": ("class_embedding", "patch_embedding.weight", "position_embedding.weight"),
}
_BESIDES: Final = {
    "text": ("text_projection.weight", "logit_scale"),
    "vision": ("visual_projection.weight",),
}
_PROCESSORS: Final = ("processor_config.json", "preprocessor_config.json")


def lacking_files(names: Collection[str], *, reads_prompts: bool) -> tuple[str, ...]:
    """Return which files a network cannot see images (and prompts) without, of those not there."""
    there = set(names)
    lacking = () if there & set(_PROCESSORS) else (_PROCESSORS[1],)
    if not reads_prompts or "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there:
        return lacking
    return ("tokenizer.json", *lacking)


def clip_tensors(folder: Path, *, reads_prompts: bool) -> frozenset[str]:
    """Return the tensors that a folder's config.json asks for; of the image tower alone, or both.

    Raises:
        OSError, ValueError: the config cannot be read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    towers = ("text", "vision") if reads_prompts else ("vision",)
    return frozenset(name for tower in towers for name in _tower(tower, _layers(config, tower)))


def _layers(config: Mapping[str, Any], tower: str) -> int:
    """Return how deep a tower is; configs of before 2023 say it twice, the second counts."""
    for section in (f"{tower}_config_dict", f"{tower}_config"):
        found = config.get(section)
        if isinstance(found, Mapping) and isinstance(found.get("num_hidden_layers"), int):
            return int(found["num_hidden_layers"])
    return _DEFAULT_LAYERS


def _tower(tower: str, layers: int) -> Iterable[str]:
    model = f"{tower}_model."
    yield from _BESIDES[tower]
    yield from (f"{model}embeddings.{name}" for name in _EMBEDDINGS[tower])
    modules = [
        *_NORMS[tower],
        *(f"encoder.layers.{layer}.{name}" for layer in range(layers) for name in _LAYER),
    ]
    yield from (f"{model}{name}.{part}" for name in modules for part in ("weight", "bias"))
