"""How large known models are, and what their calls hold: what memory is estimated from. No torch.

The figures lie in ``sizes.json``, which ``scripts/model_sizes.py`` writes from traces on fake
tensors; ``tests/dipgo_core/test_footprints.py`` traces four of them again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from dipgo_core.config import Granularity

FILE: Final = Path(__file__).with_name("sizes.json")


@dataclass(frozen=True, kw_only=True)
class CallSizes:
    """Bytes of one denoiser call, one row (one image without guidance) in 16 bit.

    forward: at most without gradients, caches not counted. cache: what soft gates keep for the next
    call. saved: with gradients, until its backward pass; backward: at most during that, if the call
    is computed again in it.
    """

    forward: int
    cache: int
    saved: int
    backward: int


@dataclass(frozen=True, kw_only=True)
class DecodeSizes:
    """Bytes of decoding one image in float32, the image included.

    forward: at most without gradients. backward: with gradients, the loss included; checkpointed:
    the same when the decoder's blocks are computed again. tiled, tiled_backward: forward and
    checkpointed, in tiles of half the side.
    """

    forward: int
    backward: int
    checkpointed: int
    tiled: int
    tiled_backward: int


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """One model. denoiser, text, decoder: parameters of its networks, all text encoders together.

    side: of the images in pixels that calls and decode are told for. guided_rows: rows of the
    denoiser's batch that an image takes under guidance. upcast: whether the autoencoder asks for
    float32 where the rest is float16. calls: by granularity; empty where it is not known what they
    hold. like: the known model that `calls` and `decode` were traced of, "" for this one itself.
    """

    denoiser: int
    text: int
    decoder: int
    side: int
    guided_rows: int = 2
    upcast: bool = True
    calls: Mapping[Granularity, CallSizes] = field(default_factory=dict)
    decode: DecodeSizes | None = None
    like: str = ""

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSizes:
        fields = dict(data)
        calls = {name: CallSizes(**sizes) for name, sizes in fields.pop("calls").items()}
        return cls(**{**fields, "calls": calls, "decode": DecodeSizes(**fields["decode"])})


@cache
def known_sizes() -> Mapping[str, ModelSizes]:
    """Return the sizes of every known model, by id."""
    rows = json.loads(FILE.read_text(encoding="utf-8"))
    return {model_id: ModelSizes.from_json(row) for model_id, row in rows.items()}
