"""`sampler` of a model: noise scheduler, steps or a schedule of one's own, guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from dipgo_core.config import SamplerSettings, Spacing
from dipgo_core.errors import nearest
from dipgo_core.families import FAMILIES, NOISE_SCHEDULERS, Family, steps_rule
from dipgo_core.families.schedulers import SPACINGS
from orchestrator.sweep_file.fields import Fields, Reader, axis, choice, falling, number, whole
from orchestrator.sweep_file.identity import Identity
from orchestrator.sweep_issues import Issues
from orchestrator.yaml_source import Node

_SCHEDULERS: Final = tuple(NOISE_SCHEDULERS)
#: Schedules of one's own: timesteps of training, or amounts of noise.
_LISTS: Final[Mapping[str, Reader[tuple[Any, ...]]]] = {
    "timesteps": falling(whole(0, 999)),
    "sigmas": falling(number(above=0)),
}


def read_samplers(
    fields: Fields, identity: Identity | None, issues: Issues
) -> tuple[SamplerSettings, ...]:
    """Read `sampler`: one, or a list of them."""
    default = identity.sampler if identity is not None else FAMILIES["sd"].sampler
    family = None if identity is None else identity.family

    def read(node: Node, issues: Issues) -> SamplerSettings | None:
        with Fields(node, issues) as section:
            return _sampler(section, default, family)

    return fields.get("sampler", axis(read), (default,))


def _sampler(
    section: Fields, default: SamplerSettings, family: Family | None
) -> SamplerSettings | None:
    """Read one sampler; None after reporting what does not go together."""
    scheduler = section.get("scheduler", choice(_SCHEDULERS), default.scheduler)
    steps = section.maybe("steps", whole(1, 1000))
    guidance = section.get("guidance_scale", number(0), default.guidance_scale)
    spacing: Spacing | None = section.maybe("spacing", choice(SPACINGS))
    lists = {name: section.maybe(name, reader) for name, reader in _LISTS.items()}
    given: dict[str, Any] = {name: v for name, v in lists.items() if v is not None}
    rules = [
        _family_rule(scheduler, family),
        _lists_rule(scheduler, spacing, given, family),
        _length_rule(steps, given),
    ]
    count = steps or next((len(values) for values in given.values()), default.steps)
    if not given:
        rules.append(_steps_rule(scheduler, count, spacing))
    broken = [(name, rule) for name, rule in rules if rule is not None]
    for name, rule in broken:
        section.issues.add(section.place(name).issue(rule))
    if broken:
        return None
    return SamplerSettings(
        scheduler=scheduler, steps=count, guidance_scale=guidance, spacing=spacing, **given
    )


def _steps_rule(scheduler: str, steps: int, spacing: Spacing | None) -> tuple[str, str | None]:
    rule = steps_rule(scheduler, steps, spacing)
    if rule is None or (spacing and spacing not in NOISE_SCHEDULERS[scheduler].spacings):
        return "spacing", rule
    return "steps", f"{rule}, got {steps}"


def _family_rule(scheduler: str, family: Family | None) -> tuple[str, str | None]:
    if family is None or scheduler in family.schedulers:
        return "scheduler", None
    hint = nearest(scheduler, family.schedulers)
    return "scheduler", (
        f"{scheduler} does not fit models of family {family.name}; take one of "
        f"{', '.join(family.schedulers)}.{hint}"
    )


def _lists_rule(
    scheduler: str,
    spacing: str | None,
    given: Mapping[str, tuple[Any, ...]],
    family: Family | None,
) -> tuple[str, str | None]:
    """Return the rule that a schedule of one's own breaks, and where."""
    if not given:
        return "timesteps", None
    name = next(iter(given))
    others = [*([] if spacing is None else ["spacing"]), *list(given)[1:]]
    if others:
        return name, f"excludes {others[0]}: give one of the two"
    if name not in NOISE_SCHEDULERS[scheduler].custom:
        taking = [known for known, one in NOISE_SCHEDULERS.items() if name in one.custom]
        own = " or ".join(NOISE_SCHEDULERS[scheduler].custom) or "steps alone"
        return name, f"{scheduler} takes {own}; {name} are for {', '.join(taking)}"
    if family is not None and name not in family.custom:
        instead = f"takes {' or '.join(family.custom)}" if family.custom else "takes steps alone"
        return name, f"{family.pipeline} takes none: it {instead}"
    most = max(given[name], default=0)
    if name == "sigmas" and most > 1:
        return name, f"go from 1 (noise alone) towards 0 (the image), got {most:g}"
    return name, None


def _length_rule(steps: int | None, given: Mapping[str, tuple[Any, ...]]) -> tuple[str, str | None]:
    for name, values in given.items():
        if steps is not None and steps != len(values):
            return "steps", (
                f"must be the number of {name}, {len(values)}, or be left out, got {steps}"
            )
    return "steps", None
