"""What tasks occupy. Oracles: the sweep file, the sizes of known models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dipgo_core.families.sizes import known_sizes
from orchestrator.facts import ModelFacts
from orchestrator.plan import build_plan
from orchestrator.resources import latency_resources, resource_rows, resources_of
from orchestrator.sweep_settings import AskedResources, Resources, SweepFile, TaskResources
from tests.orchestrator.tiny_sweep import tiny_facts, tiny_sweep

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
LARGE, SMALL = TaskResources(cpus=2, gpus=1), TaskResources(cpus=1, gpus=0)


def facts_of(sweep: SweepFile, **sizes: Any) -> dict[str, ModelFacts]:
    known = tiny_facts(sweep)
    return {name: replace(fact, sizes=sizes.get(name)) for name, fact in known.items()}


def asked(**kinds: AskedResources) -> SweepFile:
    return replace(tiny_sweep(), resources=Resources(**kinds))


@pytest.mark.parametrize("kind", ["reference", "search", "evaluate", "latency", "score"])
def test_large_models_take_a_gpu_and_figures_never_do(kind: Any) -> None:
    sweep = tiny_sweep()
    large = facts_of(sweep, tiny=known_sizes()[SD15])["tiny"]
    small, unknown = facts_of(sweep, tiny=tiny_sizes())["tiny"], facts_of(sweep)["tiny"]
    assert resources_of(sweep, kind, large) == (SMALL if kind == "score" else LARGE)
    assert resources_of(sweep, kind, small) == resources_of(sweep, kind, unknown) == SMALL


def tiny_sizes() -> Any:
    return replace(known_sizes()[SD15], denoiser=10**6, text=10**6, decoder=10**5)


def test_what_the_sweep_file_says_wins_field_by_field() -> None:
    sweep = asked(search=AskedResources(gpus=0.5, accelerator="L4"), latency=AskedResources(gpus=0))
    facts = facts_of(sweep, tiny=known_sizes()[SD15])["tiny"]
    found = resources_of(sweep, "search", facts)
    assert (found.cpus, found.gpus, found.accelerator) == (2, 0.5, "L4")
    assert resources_of(sweep, "latency", facts) == TaskResources(cpus=2, gpus=0)


def test_nothing_of_a_gpu_is_asked_where_none_is_taken() -> None:
    sweep = asked(search=AskedResources(accelerator="L4", gpu_memory_gb=24))
    facts = facts_of(sweep)
    assert resources_of(sweep, "search", facts["tiny"]) == SMALL


def test_latencies_of_all_models_share_the_device_of_the_largest() -> None:
    sweep = tiny_sweep(models=("big", "small"), targets=(0.5,))
    facts = facts_of(sweep, big=known_sizes()[SD15])
    assert latency_resources(sweep, facts) == LARGE
    plan = build_plan(sweep, {}, facts=facts, device="a gpu")
    rows = {(row.model, row.kind): row.resources for row in plan.resources}
    assert rows["big", "latency"] == rows["small", "latency"] == LARGE
    assert rows["small", "evaluate"] == SMALL


def test_only_models_that_are_timed_decide_what_latencies_take() -> None:
    sweep = tiny_sweep(metrics=("clip",))
    assert latency_resources(sweep, facts_of(sweep, tiny=known_sizes()[SD15])) == SMALL


def test_rows_tell_where_a_figure_comes_from() -> None:
    whole = AskedResources(cpus=4, gpus=2)
    sweep = asked(search=whole)
    facts = facts_of(sweep, tiny=known_sizes()[SD15])["tiny"]
    rows = {r.kind: r for r in resource_rows(sweep, "tiny", ("search", "evaluate", "score"), facts)}
    assert rows["search"].basis == "the sweep file"
    assert "G parameters: a full-size model" in rows["evaluate"].basis
    assert rows["score"].to_json()["gpus"] == 0
