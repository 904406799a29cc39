"""A CLIP as open_clip_config.json describes it: its towers and how it sees images. No torch.

Fields and their defaults are those of open_clip 3.3 (model.py: CLIPVisionCfg, CLIPTextCfg;
transform.py: PreprocessCfg).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, cast

from dipgo_core.errors import ModelFilesError
from dipgo_core.model_files import OPEN_CLIP_CONFIG

ResizeMode = Literal["shortest", "longest", "squash"]
Section = Mapping[str, Any]
T = TypeVar("T")

OPENAI_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD: Final = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A plain transformer with layer norms before attention and MLP."""

    layers: int
    width: int
    heads: int
    mlp_width: int


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes the square that the model sees."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: ResizeMode
    fill_color: int


@dataclass(frozen=True, kw_only=True)
class OpenClip:
    """One CLIP: two towers, projected to `embed_dim`."""

    embed_dim: int
    vision: Tower
    text: Tower
    image_size: int
    patch_size: int
    context_length: int
    vocab_size: int
    activation: Literal["gelu", "quick_gelu"]
    preprocess: Preprocess

    @property
    def resize(self) -> str:
        """How an image of any size reaches the network, in words."""
        how = f"Pillow's {self.preprocess.interpolation} to {self.image_size}"
        if self.preprocess.resize_mode == "squash":
            return f"{how}x{self.image_size}"
        if self.preprocess.resize_mode == "longest":
            return f"{how} on the longer side, then padded to a square"
        return f"{how} on the shorter side, then the middle square"


#: What fields must say, where they are given, for transformers' CLIP to be the same network.
#: Others that say nothing (null, false, 0, empty) are passed over.
_PLAIN: Final[Mapping[str, Mapping[str, object]]] = {
    "model_cfg": {},
    "vision_cfg": {"pos_embed_type": "learnable", "pool_type": "tok", "block_type": "default"},
    "text_cfg": {"pool_type": "argmax", "proj_type": "linear", "block_type": "default"},
}
#: Fields that are read below, and fields without effect on the features of given weights.
_READ: Final[Mapping[str, frozenset[str]]] = {
    "model_cfg": frozenset({"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}),
    "vision_cfg": frozenset(
        {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size"}
    ),
    "text_cfg": frozenset(
        {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size"}
    ),
}
_INERT: Final[Mapping[str, frozenset[str]]] = {
    "model_cfg": frozenset({"init_logit_scale", "output_dict", "cast_dtype"}),
    "vision_cfg": frozenset(
        {
            "patch_dropout",
            "attn_pooler_queries",
            "attn_pooler_heads",
            *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias"),
            *("timm_drop", "timm_drop_path"),
        }
    ),
    "text_cfg": frozenset({"pad_id", "eos_id", "hf_model_pretrained"}),
}


def read_open_clip(folder: Path) -> OpenClip:
    """Return the CLIP that a folder's open_clip_config.json describes.

    Raises:
        ModelFilesError: the file cannot be read, or it is a network that transformers' CLIP is not
            (towers of timm or of transformers' text models, other poolings): names the field.
    """
    path = folder / OPEN_CLIP_CONFIG
    try:
        return _open_clip(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelFilesError(f"{path} cannot be read ({error}): copy it again") from error
    except _Unfit as error:
        raise ModelFilesError(
            f"{path}: {error}. Only CLIPs of two plain transformers are read from open_clip's "
            "format; choose one, or a repository with transformers' own files"
        ) from error


class _Unfit(Exception):
    """A field that cannot be honoured."""


def _open_clip(whole: Any) -> OpenClip:
    model = _section(whole, "model_cfg")
    vision, text = _section(model, "vision_cfg"), _section(model, "text_cfg")
    return OpenClip(
        embed_dim=_positive(model, "embed_dim", None),
        vision=_tower(vision, heads=None, width=768),
        text=_tower(text, heads=_positive(text, "heads", 8), width=512),
        image_size=_positive(vision, "image_size", 224),
        patch_size=_positive(vision, "patch_size", 16),
        context_length=_positive(text, "context_length", 77),
        vocab_size=_positive(text, "vocab_size", 49408),
        activation="quick_gelu" if model.get("quick_gelu") else "gelu",
        preprocess=_preprocess(whole.get("preprocess_cfg") or {}),
    )


def _section(parent: Any, name: str) -> Section:
    found = parent.get(name) if isinstance(parent, dict) else None
    if not isinstance(found, dict):
        raise _Unfit(f"it has no section {name}")
    for field, value in found.items():
        known = field in _READ[name] or field in _INERT[name]
        if not known and value and value != _PLAIN[name].get(field):
            raise _Unfit(f"{name}.{field} is {value!r}")
    return found


def _tower(section: Section, *, heads: int | None, width: int) -> Tower:
    width = _positive(section, "width", width)
    heads = heads or width // _positive(section, "head_width", 64)
    if heads == 0 or width % heads:
        raise _Unfit(f"a width of {width} is no multiple of {heads or 'the head'}")
    ratio = section.get("mlp_ratio", 4.0)
    if not _is_number(ratio) or int(width * ratio) < 1:
        raise _Unfit(f"mlp_ratio is {ratio!r}")
    return Tower(
        layers=_positive(section, "layers", 12),
        width=width,
        heads=heads,
        mlp_width=int(width * ratio),
    )


def _preprocess(section: Any) -> Preprocess:
    if not isinstance(section, dict):
        raise _Unfit("preprocess_cfg is no section")
    given = {name: value for name, value in section.items() if value is not None}
    how = _one_of(given, "interpolation", ("bicubic", "bilinear", "random"))
    _one_of(given, "mode", ("RGB",))
    return Preprocess(
        mean=_channels(given, "mean", OPENAI_MEAN),
        std=_channels(given, "std", OPENAI_STD),
        interpolation="bilinear" if how == "bilinear" else "bicubic",  # random: in training alone
        resize_mode=cast(
            ResizeMode, _one_of(given, "resize_mode", ("shortest", "longest", "squash"))
        ),
        fill_color=_one_of(given, "fill_color", range(256)),
    )


def _one_of(section: Section, field: str, valid: Sequence[T]) -> T:
    """Return the value of a field, the first of the valid ones where it is not given."""
    value = section.get(field, valid[0])
    if isinstance(value, list | dict) or value not in valid:
        raise _Unfit(f"preprocess_cfg.{field} is {value!r}")
    return cast(T, value)


def _channels(section: Section, field: str, default: tuple[float, ...]) -> tuple[float, ...]:
    """Return one number a channel; open_clip takes one number for all, too."""
    value = section.get(field, default)
    values = list(value) if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(map(_is_number, values)):
        raise _Unfit(f"preprocess_cfg.{field} is {value!r}, not three numbers")
    return tuple(float(value) for value in values)


def _positive(section: Section, field: str, default: int | None) -> int:
    """Return a positive whole number; two equal ones, height and width, count as one."""
    value = section.get(field, default)
    if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    if type(value) is not int or value < 1:
        raise _Unfit(f"{field} is {value!r}, not a positive whole number (or a square)")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
