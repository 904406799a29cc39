"""Points of a model: baselines of schedules without spacings, gates of blocks and layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dipgo_core.config import LossSettings, SamplerSettings, SearchSettings
from dipgo_core.families import calls_of, steps_rule
from orchestrator.methods import PointSpec, granularities, point_specs, search_label
from orchestrator.sweep_settings import Baseline, SearchGrid, SweepModel
from tests.orchestrator.tiny_sweep import ALL_BASELINES, tiny_sweep

LEADING = Baseline(name="few_steps", spacing=("leading",))


def model_with(sampler: dict[str, Any], *targets: float, **changes: Any) -> SweepModel:
    (model,) = tiny_sweep(targets=targets, baselines=(LEADING,)).models
    settings = SamplerSettings(**{"guidance_scale": 3.0, **sampler})
    return replace(model, sampler=settings, **changes)


def few_steps(model: SweepModel) -> dict[str | None, SamplerSettings]:
    return {spec.variant: spec.sampler for spec in point_specs(model) if spec.method == "few_steps"}


def test_few_steps_of_a_schedule_without_spacings_is_one_point() -> None:
    model = model_with({"scheduler": "flow_match_euler", "steps": 28}, 0.5)
    (sampler,) = few_steps(model).values()
    assert sampler == replace(model.sampler, steps=14)


def test_few_steps_thins_a_schedule_of_ones_own_and_tries_the_solvers_too() -> None:
    """Oracle: entries 0, 2, 4 of six by hand; half of six calls are three."""
    listed = (999, 800, 600, 400, 200, 9)
    found = few_steps(model_with({"scheduler": "euler", "steps": 6, "timesteps": listed}, 0.5))
    assert found["subset"].timesteps == (999, 600, 200)
    assert (found["leading"].steps, found["leading"].timesteps) == (3, None)


def test_few_steps_of_sigmas_keeps_the_first() -> None:
    sampler = {"scheduler": "flow_match_euler", "steps": 4, "sigmas": (1.0, 0.8, 0.5, 0.2)}
    assert few_steps(model_with(sampler, 0.7)) == {
        "subset": SamplerSettings(
            scheduler="flow_match_euler", steps=2, guidance_scale=3.0, sigmas=(1.0, 0.5)
        )
    }


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "heun"])
def test_few_steps_are_steps_that_trailing_spacing_can_make(scheduler: str) -> None:
    """61 of 122 calls: trailing spacing would round 61 steps up to 62."""
    sampler = {"scheduler": scheduler, "steps": 122}
    model = model_with(sampler, 0.5, baselines=(replace(LEADING, spacing=("trailing",)),))
    (found,) = few_steps(model).values()
    assert steps_rule(scheduler, found.steps, "trailing") is None
    assert calls_of(found) >= calls_of(model.sampler) / 2


@pytest.mark.parametrize("steps", [61, 121, 122, 465, 998, 1000])
def test_any_number_of_steps_has_fewest_that_trailing_spacing_can_make(steps: int) -> None:
    """Such as 121: neither 121 nor 122 steps can be made, 123 can."""
    model = model_with(
        {"scheduler": "ddim", "steps": steps},
        0.0,
        baselines=(replace(LEADING, spacing=("trailing",)),),
    )
    (found,) = few_steps(model).values()
    assert found.steps >= steps and steps_rule("ddim", found.steps, "trailing") is None


def at_both(model: SweepModel) -> SweepModel:
    axes = {**model.grid.axes, "granularity": ("layer", "block")}
    return replace(model, grid=SearchGrid(axes=axes, losses=model.grid.losses))


def test_searches_and_random_draws_are_listed_at_each_granularity() -> None:
    (model,) = tiny_sweep(targets=(0.5,), baselines=ALL_BASELINES).models
    model = at_both(model)
    specs = list(point_specs(model))
    assert granularities(model) == ("layer", "block")
    by_method: dict[str, list[PointSpec]] = {}
    for spec in specs:
        by_method.setdefault(spec.method, []).append(spec)
    assert [spec.granularity for spec in by_method["search"]] == ["layer", "block"]
    assert [spec.granularity for spec in by_method["random"]] == ["layer"] * 2 + ["block"] * 2
    others = {spec.granularity for spec in specs if spec.method not in ("search", "random")}
    assert others == {"layer"}
    assert len({spec.label for spec in specs}) == len(specs)


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"strategy": "auto"}, "auto seed 0"),
        ({"strategy": "auto", "effort": 500, "steps": 3}, "auto effort 500 seed 0"),
        ({"strategy": "anneal", "objective": "latent"}, "anneal objective latent seed 0"),
        ({"strategy": "dipgo", "effort": 500}, "dipgo ssim alpha 1 seed 0"),
        (
            {"strategy": "dipgo", "start": "random", "loss": LossSettings(gamma=False), "seed": 2},
            "dipgo ssim alpha 1 start random without gamma seed 2",
        ),
    ],
)
def test_label_of_a_search_tells_what_is_compared(fields: dict[str, Any], label: str) -> None:
    assert search_label(SearchSettings(**fields)) == label
