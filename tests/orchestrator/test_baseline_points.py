"""Points of the baselines that change solver, timesteps, layers or guidance; those left out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dipgo_core.blocks import known_graph
from dipgo_core.config import SamplerSettings
from dipgo_core.families import KNOWN_MODELS, guided_share
from orchestrator.methods import (
    BASELINES,
    CALIBRATED,
    TRIVIAL,
    PointSpec,
    gated_layers,
    gates_of,
    left_out,
    point_specs,
)
from orchestrator.sweep_file.evaluate import BASELINES as READ
from orchestrator.sweep_settings import Baseline, SweepModel
from tests.orchestrator.tiny_sweep import tiny_sweep

BOTH = ("own", "dpm++2m")
EVERY = (
    Baseline(name="few_steps", spacing=("leading", "trailing"), solver=BOTH),
    Baseline(name="ays", solver=BOTH),
    Baseline(name="deepcache", schedules=2),
    Baseline(name="guidance_off"),
)


def model_of(*targets: float, family: str = "sd", **sampler: object) -> SweepModel:
    (model,) = tiny_sweep(targets=targets, baselines=EVERY).models
    settings = {**model.sampler.to_json(), **sampler}
    return replace(model, family=family, sampler=SamplerSettings(**settings))


def points(model: SweepModel, method: str) -> dict[str | None, PointSpec]:
    return {spec.variant: spec for spec in point_specs(model) if spec.method == method}


def test_every_baseline_that_is_read_is_made_and_calibrated_but_random() -> None:
    assert set(BASELINES) == set(READ) == {*TRIVIAL, "random"}
    assert set(TRIVIAL) < set(CALIBRATED)


def test_few_steps_are_also_made_with_the_other_solver_where_it_is_another() -> None:
    found = points(model_of(0.7), "few_steps")
    assert list(found) == ["leading", "trailing", "dpm++2m leading", "dpm++2m trailing"]
    sampler = found["dpm++2m leading"].sampler
    assert (sampler.scheduler, sampler.steps, sampler.spacing) == ("dpm++2m", 3, "leading")
    own = points(model_of(0.7, scheduler="dpm++2m"), "few_steps")
    assert list(own) == ["leading", "trailing"]
    assert list(
        points(model_of(0.5, family="flux", scheduler="flow_match_euler"), "few_steps")
    ) == [None]


def test_ays_has_the_calls_of_equal_compute_with_solvers_that_take_timesteps() -> None:
    """Oracle: DDIM takes no timesteps in diffusers, Euler and DPM-Solver++ do; 5 of 10 calls."""
    assert list(points(model_of(0.5), "ays")) == ["dpm++2m"]
    found = points(model_of(0.5, scheduler="euler"), "ays")
    assert list(found) == ["euler", "dpm++2m"]
    assert found["euler"].sampler.timesteps == (999, 736, 545, 343, 124)  # every other of the ten


@pytest.mark.parametrize(
    ("target", "calls"), [(0.5, 0), (0.45, 1), (0.3, 4), (0.1, 8), (0.04, None)]
)
def test_guidance_is_left_out_as_far_as_equal_compute_lets(
    target: float, calls: int | None
) -> None:
    """Oracle: by hand, g guided calls of 10 cost (10 + g) / 20 of all."""
    (spec,) = points(model_of(target), "guidance_off").values()
    assert spec.sampler.guidance_calls == calls
    assert guided_share(spec.sampler) >= 1 - target


def test_deepcache_has_gates_of_layers() -> None:
    model = model_of(0.5)
    graph = known_graph(next(known for known in KNOWN_MODELS if known.id == "tiny-sd"), "layer")
    first, second = points(model, "deepcache").values()
    assert first.granularity == "layer" and gated_layers(model)
    tables = [gates_of(spec, model, graph, None, "all") for spec in (first, second)]
    assert [table.keep.all(axis=1).sum() for table in tables] == [5, 4]
    assert all(graph.pruned_ratio(table) <= 0.5 for table in tables)


def test_what_a_model_lacks_is_left_out_and_told() -> None:
    lines = list(left_out(model_of(0.3, 0.7, family="dit")))
    assert lines == [
        "tiny: no ays at 0.3, 0.7: diffusers ships no Align-Your-Steps list for dit",
        "tiny: no deepcache at 0.3, 0.7: DeepCache is for U-Nets, dit is none",
        "tiny: no guidance_off at 0.7: a run without any guidance still spends more than half",
    ]
    model = model_of(0.3, guidance_scale=1.0)
    assert list(left_out(model)) == [
        "tiny: no guidance_off at 0.3: there is no guidance at guidance_scale 1"
    ]
    assert not points(model, "guidance_off")


def test_distilled_models_keep_to_their_sampler() -> None:
    model = model_of(0.3, scheduler="lcm", steps=4)
    assert {spec.sampler.scheduler for spec in point_specs(model)} == {"lcm"}
    assert len(list(left_out(model))) == 2
