"""The section `explore`: which settings a sampler varies, how often, and when it stops."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Final, get_args

from dipgo_core.errors import nearest
from orchestrator.sweep_file.fields import (
    MAX_SEED,
    Fields,
    Reader,
    choice,
    many,
    number,
    reject,
    whole,
)
from orchestrator.sweep_file.search import search_reader
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import (
    Dimension,
    DimensionKind,
    Explore,
    ExploreSampler,
    ExploreStop,
)
from orchestrator.yaml_source import Node, join

SAMPLERS: Final[tuple[ExploreSampler, ...]] = get_args(ExploreSampler)
#: What may be varied. `batch_size`, `query_dim`, `samples`, `objective` and `staleness` decide how
#: much memory a search takes, which is planned for before anything is proposed.
EXPLORABLE: Final = (
    *("target", "steps", "seed", "granularity", "encoder", "learning_rate", "warmup_steps"),
    *("weight_decay", "accumulation", "loss.alpha", "loss.tau", "loss.gamma", "loss.consistency"),
    "effort",
)
RANGES: Final = tuple(kind for kind in get_args(DimensionKind) if kind != "choice")
MAX_EXPLORED: Final = 10_000

_WHOLE: Final = ("steps", "seed", "warmup_steps", "accumulation", "effort")
_WORDS: Final = ("granularity", "encoder", "loss.gamma", "loss.consistency")
_TPE: Final[ExploreSampler] = "tpe"
_RANGE: Final = re.compile(r"([a-z]+)\(\s*([^,()\s]+)\s*,\s*([^,()\s]+)\s*\)")


def read_explore(node: Node, issues: Issues) -> Explore | None:
    """Read `explore`; absent = the searches are a grid."""
    if node.value is None:
        return None
    with Fields(node, issues) as section:
        section.demand("points", hint="how many points to propose, such as 40")
        section.demand("over", hint="what to vary, such as {loss.alpha: loguniform(0.1, 4)}")
        sampler = section.get("sampler", choice(SAMPLERS), _TPE)
        batch = section.get("batch", whole(1, 1000), 8)
        if sampler == "nsga2" and batch < 2:
            rule = "must be at least 2 with nsga2, which crosses two points of a batch"
            issues.add(section.place("batch").issue(f"{rule}, got {batch}"))
        return Explore(
            sampler=sampler,
            points=section.get("points", whole(1, MAX_EXPLORED), 1),
            over=dict(_over(section.section("over"), issues)),
            batch=batch,
            seed=section.get("seed", whole(0, MAX_SEED), 0),
            stop=_stop(section.section("stop"), issues),
        )


def _stop(node: Node, issues: Issues) -> ExploreStop | None:
    if node.value is None:
        return None
    with Fields(node, issues) as section:
        section.demand("gpu_hours", hint="how long the hypervolume may stand still, such as 10")
        return ExploreStop(
            epsilon=section.get("epsilon", number(0), 0.01),
            gpu_hours=section.get("gpu_hours", number(above=0), 1.0),
        )


def _over(node: Node, issues: Issues) -> Iterator[tuple[str, Dimension]]:
    """Yield what is varied; ``loss.alpha`` may also be written as ``loss: {alpha: ...}``."""
    if node.value is not None and not (isinstance(node.value, Mapping) and node.value):
        reject(node, issues, "must be a mapping of settings to ranges or lists")
        return
    for name, place in _flat(node.value or {}):
        if name not in EXPLORABLE:
            rule = f"cannot be explored; what can is {', '.join(EXPLORABLE)}"
            hint = nearest(name, EXPLORABLE)
            issues.add(place.issue(f"{rule}{'.' if hint else ''}{hint}", at_key=True))
            continue
        dimension = _dimension(name, place, issues)
        if dimension is not None:
            yield name, dimension


def _flat(values: Mapping[str, Node], prefix: str = "") -> Iterator[tuple[str, Node]]:
    for name, node in values.items():
        if isinstance(node.value, Mapping):
            yield from _flat(node.value, join(prefix, name))
        else:
            yield join(prefix, name), node


def _dimension(name: str, node: Node, issues: Issues) -> Dimension | None:
    reader = number(0, below=1) if name == "target" else search_reader(name)
    if isinstance(node.value, tuple):
        choices = many(reader, at_least=2)(node, issues)
        return None if choices is None else Dimension(kind="choice", choices=choices)
    found = _RANGE.fullmatch(node.value.strip()) if isinstance(node.value, str) else None
    if found is None or found[1] not in RANGES:
        ranges = ", ".join(f"{kind}(low, high)" for kind in RANGES)
        reject(node, issues, f"must be a list of values, or one of {ranges}")
        return None
    return _range(name, found, node, issues, reader)


def _range(
    name: str, found: re.Match[str], node: Node, issues: Issues, reader: Reader[Any]
) -> Dimension | None:
    """Return a range whose ends the setting itself would accept."""
    kind: DimensionKind = next(each for each in RANGES if each == found[1])
    rule = _range_rule(name, kind, found[2], found[3])
    if rule is not None:
        reject(node, issues, rule)
        return None
    ends = [_figure(text, kind) for text in (found[2], found[3])]
    read = [reader(replace(node, value=end), issues) for end in ends]
    if None in read:
        return None
    return Dimension(kind=kind, low=float(ends[0]), high=float(ends[1]))


def _range_rule(name: str, kind: DimensionKind, low: str, high: str) -> str | None:
    """Return the rule that a range breaks, or None."""
    if name in _WORDS:
        return "is no number: give a list of values"
    integral = kind in ("int", "logint")
    if name in _WHOLE and not integral:
        return "is a whole number: take int(low, high) or logint(low, high)"
    convert: Callable[[str], float] = int if integral else float
    try:
        first, last = convert(low), convert(high)
    except ValueError:
        return f"needs two {'whole ' if integral else ''}numbers"
    if not first < last:
        return "needs a low end below its high end"
    return "needs a low end above 0" if kind.startswith("log") and first <= 0 else None


def _figure(text: str, kind: DimensionKind) -> float | int:
    return int(text) if kind in ("int", "logint") else float(text)
