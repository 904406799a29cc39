"""Skipped calls that extrapolate: equal to a hand-written loop, held no longer than read."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import gated_latents, tiny_dit, tiny_model, tiny_scheduler, tiny_sd

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import SubNetError
from dipgo_core.gates import GateTable
from dipgo_core.hooks import install
from dipgo_core.items import Item
from dipgo_core.pipelines import block_graph
from dipgo_core.repeat import repeat_of
from dipgo_core.runtime import gated_calls
from dipgo_core.sampling import Batch, rollout

CALLS = 7
BATCH = Batch((Item("a red cat", 1), Item("the blue moon", 2)), (5, 6))
SAMPLER = SamplerSettings(scheduler="ddim", steps=CALLS, guidance_scale=3.0)


class ByHand:
    """The oracle: whole calls or none, and a straight line through the last two predictions."""

    def __init__(self, model, computed, share):
        self.model, self.computed, self.share, self.known = model, computed, share, []

    def start_call(self, call):
        self.call = call

    def denoiser(self, sample, timestep, compute):
        at = repeat_of(self.model.pipe.scheduler).at(sample, timestep)
        if self.call in self.computed:
            prediction = compute()
            self.known.append((self.call, at.repeatable(prediction)[0]))
            return prediction
        last, now = self.known[-1]
        before, old = self.known[-2] if len(self.known) > 1 else (last - 1, now)
        slope = (now - old) / (last - before)
        return at.predictions((now + self.share * (self.call - last) * slope,))

    def block(self, index, streams, compute):
        return compute()


def by_hand(model, computed, share):
    policy = ByHand(model, computed, share)
    handle = install(model.denoiser, block_graph(model), policy)
    try:
        return rollout(model, BATCH, SAMPLER, on_call=policy.start_call)
    finally:
        handle.remove()


def v_prediction():
    return tiny_sd(tiny_scheduler(prediction_type="v_prediction"))


@torch.no_grad()
@pytest.mark.parametrize("computed", [(0, 2, 3), (0, 1, 4, 6), (0, 5)])
@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("build", [tiny_sd, tiny_dit, v_prediction])
def test_extrapolated_calls_equal_a_loop_by_hand(build, share, computed):
    model = tiny_model(build())
    graph = block_graph(model)
    whole = GateTable.from_calls(computed, CALLS, graph.num_blocks)
    gates = GateTable(whole.keep, share)
    found = gated_latents(model, graph, gates, BATCH, SAMPLER)
    expected = by_hand(model, computed, share)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    repeated = gated_latents(model, graph, whole, BATCH, SAMPLER)
    if len([call for call in computed if call < CALLS - 1]) > 1:
        assert not torch.allclose(found, repeated, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_two_predictions_are_held_only_while_they_are_read():
    model = tiny_model(tiny_dit())
    graph = block_graph(model)
    gates = GateTable(GateTable.from_calls((0, 1, 3, 4), CALLS, graph.num_blocks).keep, 1.0)
    assert [row.past for row in graph.schedule(gates).rows] == [1, 2, 0, 1, 2, 2, 0]
    held = []
    with gated_calls(model, graph, gates) as policy:

        def on_call(call):
            policy.start_call(call)
            if policy._places:
                held.append(len(policy._places[0].past))

        rollout(model, BATCH, SAMPLER, on_call=on_call)
        assert held == [1, 2, 0, 1, 2, 2] and not policy._places[0].past
        size = 2 * 2 * 8 * 8 * 8 * 4  # guided, two images, eight channels of 8 x 8 float32
        assert policy.peak_cache_bytes == 2 * size == graph.peak_cache(gates, _sizes(graph, size))


def _sizes(graph, prediction):
    return [prediction, *[0] * (graph.num_blocks - 1)]


def test_extrapolation_is_part_of_a_table():
    keep = GateTable.from_calls((0,), 2, 3).keep
    plain, bent = GateTable(keep), GateTable(keep, 0.5)
    assert plain != bent and plain.digest != bent.digest
    assert GateTable.from_strings(bent.to_strings(), 0.5) == bent
    assert GateTable(np.array(keep), 0.0).digest == plain.digest


@pytest.mark.parametrize("share", [-0.1, 2.5, float("nan")])
def test_extrapolation_out_of_range_is_refused(share):
    with pytest.raises(SubNetError, match="between 0 and 2"):
        GateTable(GateTable.all_keep(2, 3).keep, share)
