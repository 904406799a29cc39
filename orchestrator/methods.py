"""Which points a model has, and which gates each of them stands for. numpy, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from dipgo_core.baselines import (
    deepcache_schedules,
    equal_compute_calls,
    random_gates,
    uniform_calls,
)
from dipgo_core.config import Convention, Granularity, SamplerSettings, SearchSettings
from dipgo_core.errors import TargetError
from dipgo_core.families import calls_of
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.outcome import SearchOutcome
from dipgo_core.postprocess import PAPER_TOLERANCE, select
from dipgo_core.strategies import MASKED_ITEMS, NEEDS, decisive, effective
from orchestrator.baseline_samplers import absence, aligned_steps, fewer_steps, unguided_steps
from orchestrator.records import content_key
from orchestrator.sweep_settings import Baseline, SweepModel

Method = Literal[
    "dense",
    "few_steps",
    "ays",
    "uniform",
    "best_step_mask",
    "deepcache",
    "guidance_off",
    "random",
    "search",
]

#: Baselines of which the best one, chosen on calibration prompts, is what a search has to beat.
TRIVIAL: tuple[Method, ...] = (
    *("few_steps", "ays", "uniform", "best_step_mask"),
    *("deepcache", "guidance_off"),
)

#: Points that are also measured on calibration prompts, so that nothing is chosen on the test set.
CALIBRATED: tuple[Method, ...] = (*TRIVIAL, "search")

STEP_MASKS = "best_step_mask"

#: Settings of a search that its name tells where they are not the default.
_COMPARED: Final = (
    *("objective", "effort", "samples", "staleness", "extrapolate"),
    *("encoder", "start", "sampling"),
)


@dataclass(frozen=True, kw_only=True)
class PointSpec:
    """One point before anything is known of its gates.

    search: settings of the search it takes its gates from. variant: solver (if not the model's own)
    and timestep spacing of `few_steps` (or `subset`, of a schedule of one's own), solver of `ays`,
    number of a random draw or of a DeepCache schedule. granularity: what its gates switch.
    """

    method: Method
    sampler: SamplerSettings
    granularity: Granularity = "block"
    target: float | None = None
    search: SearchSettings | None = None
    variant: str | None = None

    @property
    def seed(self) -> int | None:
        """What the drawing of this point's gates depends on."""
        if self.method == "random":
            return int(self.variant or 0)
        return self.search.seed if self.search and self.method == "search" else None

    @property
    def label(self) -> str:
        """Name for people, such as ``search ssim alpha 1 seed 0 at 0.5``."""
        name = search_label(self.search) if self.search and self.method == "search" else self.method
        layers = "layers" if self.granularity == "layer" and self.method == "random" else ""
        parts = [
            name,
            layers,
            self.variant or "",
            "" if self.target is None else f"at {self.target:g}",
        ]
        return " ".join(part for part in parts if part)


def search_label(search: SearchSettings) -> str:
    """Return what tells a search apart from others of its sweep."""
    if search.strategy == STEP_MASKS:
        return search.strategy
    told = decisive(search)
    parts = [search.strategy, "layers" if search.granularity == "layer" else ""]
    if "loss" in told:
        parts += [losses_of(told), f"alpha {search.loss.alpha:g}"]
    return " ".join(filter(None, [*parts, *unusual(told), f"seed {search.seed}"]))


def losses_of(search: Mapping[str, Any]) -> str:
    """Return the consistency losses of a search's settings as JSON, joined by plus signs."""
    return "+".join(name for name, weight in search["loss"]["consistency"].items() if weight)


def unusual(search: Mapping[str, Any]) -> list[str]:
    """Return those of a search's settings in words that are not the default, of some that are
    compared: ablations and budgets."""
    plain = SearchSettings().to_json()
    known = [name for name in _COMPARED if name in search]
    words = [f"{name} {search[name]}" for name in known if search[name] != plain[name]]
    weighted = search.get("loss", {}).get("gamma", True)
    return words if weighted else [*words, "without gamma"]


def searches(model: SweepModel) -> tuple[SearchSettings, ...]:
    """Return the distinct searches of the grid; those of an exploration are proposed one by one."""
    return () if model.explore is not None else kinds_of_search(model)


def kinds_of_search(model: SweepModel) -> tuple[SearchSettings, ...]:
    """Return the searches of the grid, or what those of an exploration have in common.

    What a strategy does not read tells no two of its searches apart.
    """
    found = map(effective, model.searches())
    return tuple({content_key(settings.to_json()): settings for settings in found}.values())


def granularities(model: SweepModel) -> tuple[Granularity, ...]:
    """Return what gates of the model's searches switch; points that keep or skip whole calls are
    listed at the first."""
    return tuple(dict.fromkeys(settings.granularity for settings in model.searches()))


def step_mask_search(model: SweepModel) -> SearchSettings | None:
    """Return the search for step masks, if the baseline or another search takes masks from it."""
    wanted = any(baseline.name == STEP_MASKS for baseline in model.baselines)
    begin = any("step_masks" in NEEDS.get(one.strategy, ()) for one in kinds_of_search(model))
    return step_mask_settings(model) if wanted or begin else None


def step_mask_settings(model: SweepModel) -> SearchSettings:
    """Return the search for step masks: all there is to say of it is how many images it runs."""
    images = min(model.calibration.images, MASKED_ITEMS)
    return SearchSettings(strategy=STEP_MASKS, batch_size=images)


def point_specs(model: SweepModel) -> Iterator[PointSpec]:
    """Yield every point of a model: dense, the baselines of each target, the searched ones."""
    first = granularities(model)[0]
    yield PointSpec(method="dense", sampler=model.sampler, granularity=first)
    for baseline in model.baselines:
        for target in model.targets:
            if absence(model, baseline, bar_target(model, target)) is None:
                yield from BASELINES[baseline.name](model, baseline, target)
    for settings in searches(model):
        for target in model.targets:
            yield PointSpec(
                method="search",
                sampler=model.sampler,
                granularity=settings.granularity,
                target=target,
                search=settings,
            )


def left_out(model: SweepModel) -> Iterator[str]:
    """Yield a line for each baseline that the model lacks, and why; targets alike in one line."""
    for baseline in model.baselines:
        found: dict[str, list[str]] = {}
        for target in model.targets:
            why = absence(model, baseline, bar_target(model, target))
            if why is not None:
                found.setdefault(why, []).append(f"{target:g}")
        for why, targets in found.items():
            yield f"{model.name}: no {baseline.name} at {', '.join(targets)}: {why}"


def gated_layers(model: SweepModel) -> bool:
    """Return whether points of the model have gates of single layers."""
    named = any(baseline.name == "deepcache" for baseline in model.baselines)
    return "layer" in granularities(model) or (
        named and any(spec.granularity == "layer" for spec in point_specs(model))
    )


def gates_of(
    spec: PointSpec,
    model: SweepModel,
    graph: BlockGraph,
    outcome: SearchOutcome | None,
    convention: Convention,
) -> GateTable:
    """Return the gate table of a point; `outcome` is that of its search, if it has one.

    Raises:
        TargetError: no such point exists.
    """
    calls = calls_of(spec.sampler)
    if spec.target is None or spec.method in ("few_steps", "ays", "guidance_off"):
        return GateTable.all_keep(calls, graph.num_blocks)
    if spec.method == "deepcache":
        found = deepcache_schedules(graph, calls, bar_target(model, spec.target), convention)
        return found[min(int(spec.variant or 1), len(found)) - 1]
    if spec.method == "random":
        assert spec.seed is not None
        return random_gates(graph, spec.target, calls, spec.seed, convention)
    if spec.method == "search":
        assert outcome is not None
        return select(
            outcome,
            graph,
            spec.target,
            num_calls=calls,
            method=model.postprocess,
            convention=convention,
        )
    computed = _computed_calls(bar_target(model, spec.target), calls, outcome)
    return GateTable.from_calls(computed, calls, graph.num_blocks)


def bar_target(model: SweepModel, target: float) -> float:
    """Return the target whose compute baselines get: no SubNet of `target` spends more."""
    tolerance = PAPER_TOLERANCE if model.postprocess == "paper" else 0.0
    return max(0.0, round(target - tolerance, 9))


def searched_target(model: SweepModel, spec: PointSpec) -> float | None:
    """Return the target that the search behind a point is for, if it is for one."""
    if spec.target is None or spec.method != STEP_MASKS:
        return spec.target
    return bar_target(model, spec.target)


def _computed_calls(target: float, calls: int, outcome: SearchOutcome | None) -> tuple[int, ...]:
    """Return the calls of a step skipper that spends at least what a SubNet of the target does."""
    wanted = equal_compute_calls(target, calls)
    if outcome is None:
        return uniform_calls(wanted, calls)
    if wanted == calls:
        return tuple(range(calls))
    masks: Mapping[int, tuple[int, ...]] = outcome.step_masks or {}
    if wanted not in masks:
        raise TargetError(
            f"target {target:g} takes {wanted} of {calls} computed calls; the step mask search has "
            f"masks for {', '.join(map(str, sorted(masks))) or 'none'}"
        )
    return masks[wanted]


def _few_steps(model: SweepModel, baseline: Baseline, target: float) -> Iterator[PointSpec]:
    whole = point_of(model, "few_steps", target)
    for variant, sampler in fewer_steps(model, baseline, bar_target(model, target)):
        yield replace(whole, sampler=sampler, variant=variant)


def _ays(model: SweepModel, baseline: Baseline, target: float) -> Iterator[PointSpec]:
    whole = point_of(model, "ays", target)
    for variant, sampler in aligned_steps(model, baseline, bar_target(model, target)):
        yield replace(whole, sampler=sampler, variant=variant)


def _guidance_off(model: SweepModel, baseline: Baseline, target: float) -> Iterator[PointSpec]:
    sampler = unguided_steps(model, bar_target(model, target))
    if sampler is not None:
        yield replace(point_of(model, "guidance_off", target), sampler=sampler)


def _deepcache(model: SweepModel, baseline: Baseline, target: float) -> Iterator[PointSpec]:
    """Schedules at the compute of a SubNet of the target, whose gates are those of layers."""
    whole = replace(point_of(model, "deepcache", target), granularity="layer")
    for number in range(1, baseline.schedules + 1):
        yield replace(whole, variant=str(number))


def point_of(model: SweepModel, method: Method, target: float) -> PointSpec:
    """Return a point of the model's own sampler, at its first granularity."""
    first = granularities(model)[0]
    return PointSpec(method=method, sampler=model.sampler, granularity=first, target=target)


def _uniform(model: SweepModel, baseline: Baseline, target: float) -> Iterator[PointSpec]:
    yield point_of(model, "uniform", target)


def _best_step_mask(model: SweepModel, baseline: Baseline, target: float) -> Iterator[PointSpec]:
    yield replace(point_of(model, "best_step_mask", target), search=step_mask_settings(model))


def _random(model: SweepModel, baseline: Baseline, target: float) -> Iterator[PointSpec]:
    """Draws at every granularity that a search has, to compare it with."""
    for granularity in granularities(model):
        for draw in range(baseline.draws):
            spec = point_of(model, "random", target)
            yield replace(spec, granularity=granularity, variant=str(draw))


BASELINES: dict[str, Callable[[SweepModel, Baseline, float], Iterator[PointSpec]]] = {
    "few_steps": _few_steps,
    "ays": _ays,
    "uniform": _uniform,
    "best_step_mask": _best_step_mask,
    "deepcache": _deepcache,
    "guidance_off": _guidance_off,
    "random": _random,
}
