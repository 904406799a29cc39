"""Binding: what a SubNet says of the pipeline it was made for."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import diffusers
from tiny import DDIM, tiny_model, tiny_scheduler, tiny_sd, tiny_unet

from dipgo_core.binding import deciding_config, subnet_of
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import block_graph
from dipgo_core.sampling import set_sampler


def test_subnet_of_closes_the_gates_and_counts_both_conventions() -> None:
    sd = tiny_model(tiny_sd())
    graph, sampler = block_graph(sd), replace(DDIM, steps=2)
    gates = GateTable.from_strings(["1" * 10, "1111111110"])
    subnet = subnet_of(sd, graph, sampler, gates, seed=7)
    assert subnet.gates.to_strings() == ["1" * 10, "0" * 10]
    assert subnet.macs["dense"] == 2 * graph.call_macs("all") == 2 * subnet.macs["kept"]
    assert subnet.macs["paper"]["kept"] == graph.call_macs("paper")
    assert subnet.sampler["timesteps"] == set_sampler(sd, sampler)
    assert subnet.provenance == {"seed": 7}


def test_deciding_config_leaves_foreign_and_private_fields_out() -> None:
    config = {**tiny_scheduler().config, "skip_prk_steps": True}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    assert "skip_prk_steps" in scheduler.config
    assert deciding_config(scheduler) == deciding_config(tiny_scheduler())
    assert not any(key.startswith("_") for key in deciding_config(tiny_unet()))


def test_deciding_config_is_json_where_a_bound_is_infinite() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    assert scheduler.config.lambda_min_clipped == -math.inf
    config = json.loads(json.dumps(deciding_config(scheduler), allow_nan=False))
    again = diffusers.DPMSolverMultistepScheduler.from_config(config)
    assert again.config.lambda_min_clipped == -math.inf
