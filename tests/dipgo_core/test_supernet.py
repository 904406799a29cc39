"""SuperNet: hard gates equal the runtime, gradients equal finite differences of the mixture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tiny import DDIM, gated_latents, tiny_dit, tiny_model, tiny_scheduler, tiny_sd
from torch import Tensor

from dipgo_core.config import SamplerSettings
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph, Reuse
from dipgo_core.hooks import install, is_hooked
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.repeat import repeat_of
from dipgo_core.sampling import Batch, noise_scheduler, rollout
from dipgo_core.structures import Tensors
from dipgo_core.supernet import Mixture, SuperNet

ITEMS = (Item("a red cat", 3), Item("the blue moon", 5))
Setting = tuple[LoadedModel, BlockGraph, Batch]


def tiny_v() -> Any:
    """A U-Net that predicts velocity."""
    return tiny_sd(tiny_scheduler(prediction_type="v_prediction"))


@pytest.fixture(scope="module", params=[tiny_sd, tiny_v, tiny_dit], ids=["sd", "v", "dit"])
def setting(request: pytest.FixtureRequest) -> Setting:
    model = tiny_model(request.param())
    return model, block_graph(model), Batch(ITEMS, (1, 2))


def random_table(graph: BlockGraph, seed: int, num_calls: int = DDIM.steps) -> GateTable:
    keep = np.random.default_rng(seed).random((num_calls, graph.num_blocks)) < 0.7
    keep[0] = True
    keep[:, [n for n in range(graph.num_blocks) if n not in graph.searched]] = True
    return GateTable(keep)


def soft(setting: Setting, gates: Tensor, *, checkpointing: bool = False) -> Tensor:
    """Final latents and, in gates.grad, the gradient of their square sum."""
    model, graph, batch = setting
    with SuperNet(model, graph, checkpointing=checkpointing) as supernet:
        final = supernet.rollout(batch, DDIM, gates)
        if gates.requires_grad:
            final.square().sum().backward()
    return final.detach()


def table_gates(table: GateTable) -> Tensor:
    return torch.tensor(table.keep, dtype=torch.float32).requires_grad_()


@pytest.mark.parametrize("seed", range(6))
def test_hard_gates_equal_the_runtime(setting, seed):
    model, graph, batch = setting
    table = random_table(graph, seed)
    expected = gated_latents(model, graph, table, batch, DDIM)
    assert torch.allclose(soft(setting, table_gates(table)), expected, rtol=1e-5, atol=1e-5)


def test_all_kept_equals_the_plain_rollout_bit_for_bit(setting):
    model, graph, batch = setting
    with torch.no_grad():
        expected = rollout(model, batch, DDIM)
    gates = table_gates(GateTable.all_keep(DDIM.steps, graph.num_blocks))
    assert torch.equal(soft(setting, gates), expected)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers
@pytest.mark.parametrize("scheduler", ["ddim", "dpm++2m", "pndm"])
def test_checkpointing_changes_neither_latents_nor_gradients(setting, scheduler):
    model, graph, batch = setting
    sampler = SamplerSettings(scheduler=scheduler, steps=4, guidance_scale=3.0)
    table = random_table(graph, 9, num_calls=5 if scheduler == "pndm" else 4)
    results = []
    for checkpointing in (False, True):
        gates = table_gates(table)
        with SuperNet(model, graph, checkpointing=checkpointing) as supernet:
            final = supernet.rollout(batch, sampler, gates)
            final.square().sum().backward()
        results.append((final.detach(), gates.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_dead_gates_get_no_gradient_and_decisive_ones_do(setting):
    _, graph, _ = setting
    table = random_table(graph, 2)
    gates = table_gates(table)
    soft(setting, gates)
    moved = gates.grad.numpy() != 0
    for row, got in zip(table.keep[1:], moved[1:], strict=True):
        for n in graph.searched:
            kept = row.copy()
            kept[n] = True
            if not graph.live(kept)[n]:
                assert not got[n]  # oracle: brute-force liveness
    assert moved[1:].any()


def test_gates_have_no_gradient_where_everything_is_kept_and_the_loss_is_minimal(setting):
    model, graph, batch = setting
    gates = table_gates(GateTable.all_keep(DDIM.steps, graph.num_blocks))
    with torch.no_grad():
        dense = rollout(model, batch, DDIM)
    with SuperNet(model, graph) as supernet:
        final = supernet.rollout(batch, DDIM, gates)
        (final - dense).square().sum().backward()
    assert not gates.grad.any()


def test_hooks_are_gone_after_the_block_and_after_an_error(setting):
    model, graph, _ = setting
    with pytest.raises(RuntimeError, match="inside"), SuperNet(model, graph):
        assert is_hooked(model.denoiser)
        raise RuntimeError("inside")
    assert not is_hooked(model.denoiser)


class FractionalGates:
    """The oracle: g * current + (1 - g) * cached, written out; dead blocks of `keep` reuse.

    What a skipped call mixes with is the call as its own block gates have it, leaving no trace. A
    U-Net's last block decides the call: predictions mix as noise, by `repeat` (test_repeat.py).
    """

    def __init__(
        self, model: LoadedModel, graph: BlockGraph, gates: Tensor, keep: np.ndarray
    ) -> None:
        self.graph, self.gates, self.keep = graph, gates, keep
        self.repeat = repeat_of(noise_scheduler(model, DDIM))
        self.decides = 0 if 0 in graph.searched else graph.num_blocks - 1
        self.cache: dict[int, Tensor] = {}

    def denoiser(self, sample: Tensor, timestep: Any, compute) -> Tensors:
        before, at = dict(self.cache), self.repeat.at(sample, timestep)
        skipped = not self.keep[self.call, self.decides]
        self.keep[self.call, self.decides] = True
        (current,) = compute()
        if skipped:
            self.keep[self.call, self.decides] = False
            self.cache = before
        if 0 in self.cache:
            g = self.gates[self.call, self.decides]
            (cached,) = at.predictions((self.cache[0],))
            current = g * current + (1 - g) * cached
        (self.cache[0],) = at.repeatable((current,))
        return (current,)

    def block(self, index: int, streams: Tensors, compute) -> Tensors:
        outputs = compute()
        if index == self.decides:
            return outputs
        base = streams[0] if self.graph.blocks[index].reuse is Reuse.RESIDUAL else 0.0
        mixed = base + self._mixed(index, outputs[0] - base)
        if len(outputs) == 1:
            return (mixed,)
        rest = enumerate(outputs[1:], start=1)  # a down block's skip connections
        return mixed, *(self._mixed(100 * i + index, o, gate=index) for i, o in rest)

    def _mixed(self, key: int, current: Tensor, gate: int | None = None) -> Tensor:
        n = key if gate is None else gate
        g, kept = self.gates[self.call, n], self.keep[self.call].copy()
        kept[[0, n]] = True
        if key in self.cache:
            g = g if self.graph.live(kept)[n] else g * 0
            current = g * current + (1 - g) * self.cache[key]
        self.cache[key] = current
        return current

    def start_call(self, call: int) -> None:
        self.call = call


@pytest.mark.parametrize("build", [tiny_sd, tiny_v, tiny_dit], ids=["sd", "v", "dit"])
def test_gradient_equals_finite_differences_of_the_mixture(build):
    pipe = build().to(torch.float64)
    model = tiny_model(pipe)
    graph, batch = block_graph(model), Batch(ITEMS, (1, 2))
    table = random_table(graph, 4)
    gates = torch.tensor(table.keep, dtype=torch.float64).requires_grad_()
    soft((model, graph, batch), gates, checkpointing=True)

    def loss(shifted: Tensor) -> float:
        policy = FractionalGates(model, graph, shifted, table.keep.copy())
        handle = install(model.denoiser, graph, policy)
        final = rollout(model, batch, DDIM, on_call=policy.start_call)
        handle.remove()
        return final.square().sum().item()

    rng, step = np.random.default_rng(0), 1e-4
    for _ in range(12):
        t, n = int(rng.integers(1, DDIM.steps)), int(rng.choice(graph.searched))
        delta = torch.zeros_like(gates)
        delta[t, n] = step
        with torch.no_grad():
            slope = (loss(gates + delta) - loss(gates - delta)) / (2 * step)
        assert gates.grad[t, n].item() == pytest.approx(slope, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_mixture_gradient_by_hand(kept):
    current = torch.tensor([1.0, 2.0], requires_grad=True)
    cached = torch.tensor([5.0, 7.0], requires_grad=True)
    gate = torch.tensor(kept, requires_grad=True)
    out = Mixture.apply(current, cached, gate)
    (out * torch.tensor([10.0, 100.0])).sum().backward()
    assert out.tolist() == ([1, 2] if kept else [5, 7])
    assert gate.grad.item() == 10 * (1 - 5) + 100 * (2 - 7)
    assert current.grad.tolist() == [10 * kept, 100 * kept]
    assert cached.grad.tolist() == [10 * (1 - kept), 100 * (1 - kept)]


@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_mixture_in_half_precision_ignores_what_it_does_not_select(kept):
    overflowed = torch.tensor([float("inf"), 2.0], dtype=torch.float16, requires_grad=True)
    sane = torch.tensor([1.0, 3.0], dtype=torch.float16, requires_grad=True)
    gate = torch.tensor(kept, requires_grad=True)
    sides = (sane, overflowed) if kept else (overflowed, sane)
    out = Mixture.apply(*sides, gate)
    (out * torch.tensor([0.0, 4.0], dtype=torch.float16)).sum().backward()  # 0 * inf lurks
    assert out.tolist() == [1, 3]
    assert gate.grad.item() == (4.0 if kept else -4.0)
    assert overflowed.grad.tolist() == [0, 0] and sane.grad.tolist() == [0, 4]
