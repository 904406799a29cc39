"""The networks that judge images, by what a family is conditioned on."""

from __future__ import annotations

from typing import Final

from dipgo_core.families.family import Scorers

_INCEPTION: Final = "inception-v3-compat"
_CLIP_G: Final = (
    "laion/CLIP-ViT-g-14-laion2B-s34B-b88K"  # the scorer of arXiv 2410.16942, section 5
)

TEXT_TO_IMAGE: Final = Scorers(features=_INCEPTION, clip=_CLIP_G)
BY_CLASS: Final = Scorers(features=_INCEPTION, clip=None, image_reward=None)
TINY: Final = Scorers(features="tiny-features", clip="tiny-clip", cmmd="tiny-clip")
