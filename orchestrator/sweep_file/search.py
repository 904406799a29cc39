"""The section `search`: a list is an axis of the grid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from dipgo_core.config import CONSISTENCY_LOSSES, LossSettings, Postprocess, SearchSettings
from dipgo_core.strategies import READS
from orchestrator.sweep_file.context import Context
from orchestrator.sweep_file.fields import (
    MAX_SEED,
    Fields,
    Reader,
    axis,
    boolean,
    choice,
    number,
    text,
    whole,
)
from orchestrator.sweep_file.prompts import read_prompts
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import Axes, Calibration, SearchGrid
from orchestrator.yaml_source import Node, absent

#: Step masks are a baseline, which searches may begin with.
SEARCH_STRATEGIES: Final = tuple(name for name in READS if name != "best_step_mask")
POSTPROCESS: Final[tuple[Postprocess, ...]] = get_args(Postprocess)
_BUDGET: Final[Postprocess] = "budget"


@dataclass(frozen=True, kw_only=True)
class SearchSection:
    """What the section `search` says."""

    grid: SearchGrid
    calibration: Calibration
    postprocess: Postprocess


_SEARCH_READERS: Final[Mapping[str, Reader[Any]]] = {
    "strategy": choice(SEARCH_STRATEGIES),
    "steps": whole(1, 1_000_000),
    "seed": whole(0, MAX_SEED),
    "batch_size": whole(1, 4096),
    "accumulation": whole(1, 4096),
    "learning_rate": number(above=0),
    "warmup_steps": whole(0, 1_000_000),
    "weight_decay": number(0),
    "query_dim": whole(1, 65536),
    "samples": whole(1, 4096),
    "effort": whole(1, 1_000_000),
    "staleness": whole(1, 1000),
}


def read_search(node: Node, issues: Issues, context: Context) -> SearchSection:
    """Read `search`; a list is an axis of the grid."""
    with Fields(node, issues) as section:
        axes = _axes(section, SearchSettings(), _SEARCH_READERS)
        default: tuple[Axes, ...] = (_loss(absent("loss", ""), Issues()),)
        losses = section.get("loss", axis(_loss), default)
        calibration = read_calibration(section.section("calibration"), issues, context)
        postprocess = section.get("postprocess", choice(POSTPROCESS), _BUDGET)
    grid = SearchGrid(axes=axes, losses=losses)
    return SearchSection(grid=grid, calibration=calibration, postprocess=postprocess)


def search_reader(name: str) -> Reader[Any]:
    """Return the reader of one value of `search`; ``loss.x`` is a field of the loss."""
    stem, _, field = name.rpartition(".")
    default, readers = (
        (LossSettings(), _LOSS_READERS) if stem == "loss" else (SearchSettings(), _SEARCH_READERS)
    )
    return readers.get(field) or _by_type(get_type_hints(type(default))[field])


def _axes(
    section: Fields, default: SearchSettings | LossSettings, readers: Mapping[str, Reader[Any]]
) -> dict[str, tuple[Any, ...]]:
    """Read every field of a settings class as an axis; `loss` is read apart."""
    hints = get_type_hints(type(default))
    axes: dict[str, tuple[Any, ...]] = {}
    for name in (item.name for item in fields(default) if item.name != "loss"):
        reader = readers[name] if name in readers else _by_type(hints[name])
        axes[name] = section.get(name, axis(reader), (getattr(default, name),))
    return axes


def _by_type(kind: Any) -> Reader[Any]:
    if get_origin(kind) is Literal:
        return choice(get_args(kind))
    readers: dict[Any, Reader[Any]] = {bool: boolean, int: whole(), float: number(), str: text()}
    return readers[kind]


def _loss(node: Node, issues: Issues) -> Axes:
    with Fields(node, issues) as section:
        return _axes(section, LossSettings(), _LOSS_READERS)


def _consistency(node: Node, issues: Issues) -> dict[str, float] | None:
    """Read ``{ssim: 1.0, l1: 0.5}``, or one name for weight 1."""
    if isinstance(node.value, str):
        name = choice(CONSISTENCY_LOSSES)(node, issues)
        return None if name is None else {name: 1.0}
    with Fields(node, issues) as section:
        read = {name: section.maybe(name, number(0)) for name in CONSISTENCY_LOSSES}
    weights = {name: weight for name, weight in read.items() if weight is not None}
    if isinstance(node.value, Mapping) and not any(weights.values()):
        rule = f"needs a positive weight for one of {', '.join(CONSISTENCY_LOSSES)}"
        issues.add(node.issue(rule))
        return None
    return weights or None


_LOSS_READERS: Final[Mapping[str, Reader[Any]]] = {
    "consistency": _consistency,
    "alpha": number(0),
    "tau": number(0, below=1),
}


def read_calibration(node: Node, issues: Issues, context: Context) -> Calibration:
    """Read `search.calibration`."""
    with Fields(node, issues) as section:
        prompts = read_prompts(section, issues, context, "calibration")
        return Calibration(
            prompts=prompts,
            images=section.get("images", whole(1, 1_000_000), prompts.rows or 32),
            batch_size=section.get("batch_size", whole(1, 4096), 16),
            seed=section.get("seed", whole(0, MAX_SEED), 0),
        )
