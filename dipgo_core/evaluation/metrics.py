"""The image metrics: what each compares, which network it needs, which way is better. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, get_args

MetricKind = Literal["distribution", "prompt", "paired"]
#: What a scoring network is used for; a sweep names one network for each role it needs.
Role = Literal["features", "clip", "cmmd", "lpips", "dino", "image_reward"]

ROLES: Final[tuple[Role, ...]] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One way to judge images.

    kind: distribution = all images against all reference images; prompt = each image against its
    prompt; paired = each image against the dense image of the same noise.
    role: of the network it needs, None where it needs none.
    """

    kind: MetricKind
    role: Role | None = None
    higher_is_better: bool = True

    @property
    def per_image(self) -> bool:
        """Whether each image has a score of its own, and the figure is their mean."""
        return self.kind != "distribution"


METRICS: Final[Mapping[str, Metric]] = {
    "fid": Metric(kind="distribution", role="features", higher_is_better=False),
    "kid": Metric(kind="distribution", role="features", higher_is_better=False),
    "cmmd": Metric(kind="distribution", role="cmmd", higher_is_better=False),
    "clip": Metric(kind="prompt", role="clip"),
    "image_reward": Metric(kind="prompt", role="image_reward"),
    "psnr": Metric(kind="paired"),
    "ssim": Metric(kind="paired"),
    "lpips": Metric(kind="paired", role="lpips", higher_is_better=False),
    "dino": Metric(kind="paired", role="dino", higher_is_better=False),
}

#: Fewer prompts have too few pairs of images to tell how much KID and its like vary.
MIN_PROMPTS: Final = 8

PER_IMAGE: Final = tuple(name for name, metric in METRICS.items() if metric.per_image)
PAIRED: Final = tuple(name for name, metric in METRICS.items() if metric.kind == "paired")
DISTRIBUTION: Final = tuple(name for name, m in METRICS.items() if m.kind == "distribution")


def roles_of(metrics: tuple[str, ...]) -> tuple[Role, ...]:
    """Return the roles that these metrics need a network for, each once."""
    needed = {METRICS[name].role for name in metrics if name in METRICS}
    return tuple(role for role in ROLES if role in needed)


#: Roles whose network turns images into features that are compared as a set.
FEATURE_ROLES: Final = roles_of(DISTRIBUTION)
