"""SubNet.resample: rows on other numbers of steps, from the file alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import DDIM, tiny_dit, tiny_model, tiny_sd

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import SubNetError
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import set_sampler
from dipgo_core.subnet import SubNet, config_sha256

TEN = replace(DDIM, steps=10)
MIXED = ["1" * 10, "1111000001", "0" * 10, "1110000011", "1" * 10, *["0" * 10, "1110000011"] * 3]


@pytest.fixture(scope="module")
def sd() -> LoadedModel:
    return tiny_model(tiny_sd())


def mixed(model: LoadedModel, sampler: SamplerSettings = TEN) -> SubNet:
    calls = len(set_sampler(model, sampler))
    rows = (MIXED * 5)[:calls]
    return subnet_of(model, block_graph(model), sampler, GateTable.from_strings(rows), seed=3)


@pytest.mark.parametrize("scheduler", ["ddim", "pndm", "dpm++2m", "euler", "heun", "unipc", "lcm"])
@pytest.mark.parametrize("steps", [4, 25])
def test_timesteps_are_those_of_the_stock_scheduler(
    sd: LoadedModel, scheduler: str, steps: int
) -> None:
    sampler = replace(TEN, scheduler=scheduler)
    new = mixed(sd, sampler).resample(steps)
    assert new.sampler["timesteps"] == set_sampler(sd, replace(sampler, steps=steps))
    assert new.gates.num_calls == len(new.sampler["timesteps"])
    assert new.call_kwargs()["num_inference_steps"] == steps


@pytest.mark.parametrize("steps", [1, 3, 7, 10, 20, 37])
@pytest.mark.parametrize("seed", range(2))
def test_no_more_is_pruned_than_before(sd: LoadedModel, steps: int, seed: int) -> None:
    graph, rng = block_graph(sd), np.random.default_rng(seed)
    set_sampler(sd, TEN)
    keep = rng.random((10, 10)) < rng.random((10, 1))
    keep[0] = True
    old = subnet_of(sd, graph, TEN, GateTable(keep))
    new = old.resample(steps)
    ratio = graph.pruned_ratio(new.gates)
    assert ratio <= old.macs["pruned_ratio"] + 1e-9
    assert new.macs["pruned_ratio"] == pytest.approx(ratio)
    assert new.macs["kept"] == pytest.approx(graph.macs(new.gates), abs=1)
    assert new.macs["dense"] == graph.call_macs() * steps
    assert new.macs["paper"]["kept"] == pytest.approx(graph.macs(new.gates, "paper"), abs=1)
    if steps >= 20:  # rows are fine enough to come close
        assert ratio > old.macs["pruned_ratio"] - 2 / steps


def test_every_row_is_one_of_the_old_run_or_whole(sd: LoadedModel) -> None:
    new = mixed(sd).resample(7)
    assert set(new.gates.to_strings()) <= {*MIXED, "1" * 10}
    assert new.gates.to_strings()[0] == "1" * 10


def test_rows_stay_where_they_were_in_the_run(sd: LoadedModel) -> None:
    """Whole calls first, skips last: doubling the steps doubles each row."""
    set_sampler(sd, TEN)
    old = subnet_of(sd, block_graph(sd), TEN, GateTable.from_calls([0, 1, 2, 3, 4], 10, 10))
    assert old.resample(20).gates == GateTable.from_calls(range(10), 20, 10)
    assert old.resample(10).gates == old.gates


def test_provenance_says_from_what_and_metrics_are_dropped(sd: LoadedModel) -> None:
    old = replace(mixed(sd), metrics={"clip": {"value": 1.0}})
    new = old.resample(5)
    assert new.metrics == {}
    assert new.provenance["seed"] == 3
    assert new.provenance["resampled_from"] == {
        "steps": 10,
        "calls": 10,
        "keep_sha256": old.gates.digest,
        "pruned_ratio": old.macs["pruned_ratio"],
    }


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_a_resampled_subnet_runs_where_the_old_one_is_refused(make: Any) -> None:
    model = tiny_model(make())
    graph = block_graph(model)
    set_sampler(model, TEN)
    old = subnet_of(model, graph, TEN, GateTable.from_calls([0, 3, 6], 10, graph.num_blocks))
    new = SubNet.from_json(old.resample(6).to_json())
    prompt = ["a cat"] if model.family.conditioning == "prompt" else [1]
    with apply_subnet(model.pipe, old), pytest.raises(SubNetError, match=r"resample\(steps\)"):
        model.pipe(prompt, **new.call_kwargs())
    with apply_subnet(model.pipe, new) as handle:
        assert torch.isfinite(
            torch.as_tensor(model.pipe(prompt, output_type="pt", **new.call_kwargs()).images)
        ).all()
    assert handle.peak_cache_bytes > 0


@pytest.mark.parametrize("steps", [0, -3, 100_000])
def test_impossible_steps_are_refused(sd: LoadedModel, steps: int) -> None:
    with pytest.raises(SubNetError, match=f"DDIMScheduler cannot do {steps} steps"):
        mixed(sd).resample(steps)


def test_a_list_of_ones_own_is_refused(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    listed = replace(subnet, sampler={**subnet.sampler, "custom": {"timesteps": [9, 1]}})
    with pytest.raises(SubNetError, match="list of its own"):
        listed.resample(5)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("sampler", {"scheduler": "NoSuchScheduler"}, "NoSuchScheduler.*does not have"),
        ("model", {"denoiser": "NoSuchModel"}, "no NoSuchModel"),
        ("model", {"config": {"sample_size": 8, "down_block_types": ["X"]}}, "config alone"),
        ("model", {"family": "A.unet.UNet2DConditionModel"}, "config alone"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(
    sd: LoadedModel, part: str, change: dict[str, Any], message: str
) -> None:
    subnet = mixed(sd)
    fields = {**getattr(subnet, part), **change}
    fields["config_sha256"] = config_sha256(fields["config"])
    with pytest.raises(SubNetError, match=message):
        replace(subnet, **{part: fields}).resample(5)


def test_reading_subnets_needs_no_torch() -> None:
    import subprocess

    code = "import sys, dipgo_core.subnet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
