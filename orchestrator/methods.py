"""Which points a model has, and which gates each of them stands for. numpy, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from dipgo_core.baselines import equal_compute_calls, random_gates, uniform_calls
from dipgo_core.config import (
    Convention,
    Granularity,
    SamplerSettings,
    SearchSettings,
    Spacing,
)
from dipgo_core.errors import TargetError
from dipgo_core.families import NOISE_SCHEDULERS, calls_of, num_calls, steps_rule
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.outcome import SearchOutcome
from dipgo_core.postprocess import PAPER_TOLERANCE, select
from dipgo_core.strategies import NEEDS, decisive, effective
from orchestrator.records import content_key
from orchestrator.sweep_settings import Baseline, SweepModel

Method = Literal["dense", "few_steps", "uniform", "best_step_mask", "random", "search"]

#: Baselines of which the best one, chosen on calibration prompts, is what a search has to beat.
TRIVIAL: tuple[Method, ...] = ("few_steps", "uniform", "best_step_mask")

#: Points that are also measured on calibration prompts, so that nothing is chosen on the test set.
CALIBRATED: tuple[Method, ...] = (*TRIVIAL, "search")

STEP_MASKS = "best_step_mask"

#: Settings of a search that its name tells where they are not the default.
_COMPARED: Final = (
    *("objective", "effort", "samples", "staleness"),
    *("encoder", "start", "sampling"),
)


@dataclass(frozen=True, kw_only=True)
class PointSpec:
    """One point before anything is known of its gates.

    search: settings of the search it takes its gates from. variant: timestep spacing of
    `few_steps` (or `subset`, of a schedule of one's own), number of a random draw. granularity:
    what its gates switch.
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
    images = min(model.calibration.images, model.calibration.batch_size)
    return SearchSettings(strategy=STEP_MASKS, batch_size=images)


def point_specs(model: SweepModel) -> Iterator[PointSpec]:
    """Yield every point of a model: dense, the baselines of each target, the searched ones."""
    first = granularities(model)[0]
    yield PointSpec(method="dense", sampler=model.sampler, granularity=first)
    for baseline in model.baselines:
        for target in model.targets:
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
    if spec.target is None or spec.method == "few_steps":
        return GateTable.all_keep(calls, graph.num_blocks)
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
    """Fewer steps of the same solver: as few as still make the calls of equal compute."""
    wanted = equal_compute_calls(bar_target(model, target), calls_of(model.sampler))
    whole = point_of(model, "few_steps", target)
    if model.sampler.custom:
        yield replace(whole, sampler=_subset(model.sampler, wanted), variant="subset")
    followed = NOISE_SCHEDULERS[model.sampler.scheduler].spacings
    for spacing in (s for s in baseline.spacing if s in followed):
        sampler = _with_steps(model.sampler, wanted, spacing)
        yield replace(whole, sampler=sampler, variant=spacing)
    if not followed and not model.sampler.custom:
        yield replace(whole, sampler=_with_steps(model.sampler, wanted, None))


def _with_steps(sampler: SamplerSettings, calls: int, spacing: Spacing | None) -> SamplerSettings:
    """Return the same solver with as few steps as make so many calls, or more.

    These may be more than the sampler's own, where trailing spacing cannot make those; the most
    that a noise scheduler takes, it can.
    """
    name = sampler.scheduler
    steps = next(
        steps
        for steps in range(1, NOISE_SCHEDULERS[name].max_steps + 1)
        if num_calls(name, steps) >= calls and steps_rule(name, steps, spacing) is None
    )
    return replace(sampler, steps=steps, spacing=spacing, timesteps=None, sigmas=None)


def _subset(sampler: SamplerSettings, calls: int) -> SamplerSettings:
    """Return evenly spread entries of a schedule of one's own, the first among them."""
    steps = next(s for s in range(1, sampler.steps + 1) if num_calls(sampler.scheduler, s) >= calls)
    kept = uniform_calls(steps, sampler.steps)
    lists = {name: [values[i] for i in kept] for name, values in sampler.custom.items()}
    return SamplerSettings(**{**sampler.to_json(), "steps": steps, **lists})


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
    "uniform": _uniform,
    "best_step_mask": _best_step_mask,
    "random": _random,
}
