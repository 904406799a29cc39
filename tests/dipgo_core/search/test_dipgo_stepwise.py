"""Stepwise search: gradients of single calls, stale reads, memory that does not grow with calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tiny import tiny_dit, tiny_model, tiny_sd
from torch import Tensor

from dipgo_core.config import LossSettings, SamplerSettings, SearchSettings
from dipgo_core.errors import SearchError
from dipgo_core.graph import Reuse
from dipgo_core.hooks import install, is_hooked
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.postprocess import select
from dipgo_core.repeat import repeat_of
from dipgo_core.sampling import Batch, noise_scheduler, rollout
from dipgo_core.search import SearchProblem, SearchProgress
from dipgo_core.search.dipgo_stepwise import (
    GatedBeside,
    last_computed,
    search_gates_stepwise,
)
from dipgo_core.search.guidance import Guidance
from dipgo_core.search.propagation import Propagation, measure_propagation
from dipgo_core.structures import Tensors

SAMPLER = SamplerSettings(scheduler="ddim", steps=5, guidance_scale=3.0)
STEP = 1e-5  # of finite differences
ITEMS = (Item("a red cat", 1), Item("the blue moon", 2), Item("a dog", 3))
SETTINGS = SearchSettings(
    strategy="dipgo_stepwise",
    objective="latent",
    sampling="gumbel",
    loss=LossSettings(alpha=0.2),
    steps=10,
    warmup_steps=1,
    learning_rate=2.0,
    batch_size=2,
    staleness=2,
    seed=3,
)


@pytest.fixture(scope="module", params=[tiny_sd, tiny_dit], ids=["sd", "dit"])
def problem(request: pytest.FixtureRequest) -> SearchProblem:
    model = tiny_model(request.param())
    return SearchProblem(
        model=model,
        graph=block_graph(model),
        sampler=SAMPLER,
        settings=SETTINGS,
        items=ITEMS,
        seeds=(5, 6, 7),
    )


def finish(problem: SearchProblem) -> list[SearchProgress]:
    return list(search_gates_stepwise(problem))


def batch_of_two(problem: SearchProblem) -> Batch:
    return Batch(problem.items[:2], problem.seeds[:2])


def learned(problem: SearchProblem, keep: np.ndarray, weights: Tensor) -> GatedBeside:
    return learned_and_run(problem, keep, weights)[0]


def learned_and_run(
    problem: SearchProblem, keep: np.ndarray, weights: Tensor
) -> tuple[GatedBeside, Tensor]:
    """One run beside the dense one, its parts weighted as guidance of 3 weighs them."""
    calls = len(keep)
    policy = GatedBeside(problem.graph, problem.settings.staleness)
    first = -2.0 if problem.graph.skip_gate else 3.0  # DiT's labels come first
    guidance = Guidance(torch.tensor([first, 1 - first]), 4)
    gates, sampler = torch.tensor(keep).float(), replace(SAMPLER, steps=calls)
    repeat = repeat_of(noise_scheduler(problem.model, sampler))
    policy.start(gates, repeat, Propagation(weights, guidance), 1.0)
    handle = install(problem.model.denoiser, problem.graph, policy)
    try:
        with torch.no_grad():
            final = rollout(
                problem.model, batch_of_two(problem), sampler, on_call=policy.start_call
            )
    finally:
        handle.remove()
    return policy, final


class ByHand:
    """A dense run in which one call is computed again, one block's output mixed by a number.

    What only that block reads rests with it, as in the SuperNet.
    """

    def __init__(self, problem: SearchProblem, call: int, index: int, since: int) -> None:
        self.graph, self.call, self.index, self.since = problem.graph, call, index, since
        self.share: float | None = None
        self.held: dict[int, Tensors] = {}
        row = np.ones(self.graph.num_blocks, dtype=np.bool_)
        row[index] = False
        self.skips = index in (0, self.graph.skip_gate)
        self.rests = row if self.skips else self.graph.live(row)
        self.losses: list[float] = []

    def start_call(self, call: int) -> None:
        self.now = call

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        dense = compute()
        if self.now == self.since:
            self.held[0] = dense
        if self.now == self.call:
            for self.share in (0.0, STEP):
                self.losses.append(self.squares(compute(), dense))
            self.share = None
        return dense

    def squares(self, changed: Tensors, dense: Tensors) -> float:
        if self.skips:
            changed = self.mixed(changed, self.held[0])
        one, two = (changed[0] - dense[0])[:, :4].double().chunk(2)
        first = -2.0 if self.graph.skip_gate else 3.0  # DiT's labels come first
        return float((first * one + (1 - first) * two).square().mean())

    def mixed(self, now: Tensors, held: Tensors) -> Tensors:
        return tuple(h + self.share * (n - h) for n, h in zip(now, held, strict=True))

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        outputs = compute()
        if index == self.graph.skip_gate:
            return outputs
        residual = self.graph.blocks[index].reuse is Reuse.RESIDUAL
        base = streams if residual else tuple(torch.zeros_like(o) for o in outputs)
        own = tuple(o - b for o, b in zip(outputs, base, strict=True))
        if self.share is None:
            if self.now == self.since:
                self.held[index] = own
            return outputs
        if index == self.index:
            own = self.mixed(own, self.held[index])
        elif not self.rests[index]:
            own = self.held[index]
        return tuple(b + o for b, o in zip(base, own, strict=True))


def in_float64(problem: SearchProblem) -> LoadedModel:
    pipe = tiny_sd() if problem.graph.skip_gate else tiny_dit()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.double()
    return tiny_model(pipe)


@pytest.mark.parametrize("since", [1, 2])
def test_gradient_of_a_call_is_that_of_the_mixture(problem, since):
    """Oracle: finite differences, in float64, of a run whose mixture is written out by hand."""
    double = replace(problem, model=in_float64(problem))
    keep = np.ones((5, problem.graph.num_blocks), dtype=np.bool_)
    for index in problem.graph.searched:
        rows = keep.copy()
        rows[since + 1 : 4, index] = False
        policy = learned(double, rows, torch.tensor([0, 0, 0, 2.0, 0], dtype=torch.float64))
        oracle = ByHand(double, 3, index, since)
        handle = install(double.model.denoiser, problem.graph, oracle)
        with torch.no_grad():
            rollout(double.model, batch_of_two(problem), SAMPLER, on_call=oracle.start_call)
        handle.remove()
        low, high = oracle.losses
        assert policy.loss == pytest.approx(2 * low, rel=1e-4)
        slope = 2 * (high - low) / STEP
        assert float(policy.gradient[3, index]) == pytest.approx(slope, rel=1e-3, abs=1e-8)


def test_run_beside_gives_what_the_dense_model_gives(problem):
    keep = np.random.default_rng(0).random((5, problem.graph.num_blocks)) < 0.5
    keep[0] = True
    with torch.no_grad():
        expected = rollout(problem.model, batch_of_two(problem), SAMPLER)
    policy, found = learned_and_run(problem, keep, torch.ones(5))
    assert torch.equal(found, expected) and policy.loss > 0


def test_blocks_read_the_last_call_that_computes_them_within_the_window():
    graph = block_graph(tiny_model(tiny_dit()))
    keep = np.ones((6, graph.num_blocks), dtype=np.bool_)
    keep[2:5, 3] = False  # block 3 rests in calls 2 to 4
    keep[4, 0] = False  # call 4 is skipped: nothing in it is computed
    found = last_computed(keep, graph)
    assert found[:, 3].tolist() == [0, 0, 1, 1, 1, 1]
    assert found[:, 2].tolist() == [0, 0, 1, 2, 3, 3]
    assert found[5, 0] == 3


def test_only_a_window_of_outputs_is_held(problem):
    policy = learned(problem, np.ones((5, problem.graph.num_blocks), bool), torch.ones(5))
    assert len(policy.window) == SETTINGS.staleness


def most_alive(problem: SearchProblem, calls: int) -> int:
    """Return the most bytes that backward passes hold at once in a run of so many calls."""
    keep = np.ones((calls, problem.graph.num_blocks), dtype=np.bool_)
    keep[1:, problem.graph.num_blocks // 2] = False
    alive, most = 0, 0

    def free(size: int) -> None:
        nonlocal alive
        alive -= size

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(tensor: Tensor) -> Kept:
        nonlocal alive, most
        size = tensor.numel() * tensor.element_size()
        alive, kept = alive + size, Kept(tensor)
        most = max(most, alive)
        weakref.finalize(kept, free, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        learned(problem, keep, torch.ones(calls))
    assert alive == 0  # nothing outlives its call
    return most


def test_what_is_held_for_backward_is_independent_of_the_number_of_calls(problem):
    few, many = most_alive(problem, 4), most_alive(problem, 16)
    assert 0 < many <= few


def test_search_moves_gates_and_its_scores_serve_targets(problem):
    steps = finish(problem)
    last = steps[-1]
    assert [p.search_step for p in steps] == list(range(1, 11))
    assert last.outcome is not None and not is_hooked(problem.model.denoiser)
    assert sum(p.consistency for p in steps) > 0
    for target in (0.25, 0.5, 0.75):
        gates = select(last.outcome, problem.graph, target, num_calls=5)
        assert problem.graph.pruned_ratio(gates) >= target - 1e-12


def test_search_resumed_from_safetensors_equals_the_uninterrupted_one(problem):
    whole = finish(problem)
    for progress in search_gates_stepwise(problem):
        if progress.search_step == 4:
            saved = load(save(progress.state()))
            break
    resumed = finish(replace(problem, resume=saved))
    assert [p.loss for p in resumed] == [p.loss for p in whole[4:]]
    last, expected = resumed[-1].outcome, whole[-1].outcome
    assert np.array_equal(last.scores, expected.scores)
    assert last.forwards == expected.forwards
    assert last.sample_forwards == expected.sample_forwards


def test_first_step_costs_dense_runs_alone(problem):
    """With all gates kept nothing is computed a second time: 5 calls, 4 probes, 5 calls."""
    settings = replace(SETTINGS, sampling="none", steps=1)
    (progress,) = finish(replace(problem, settings=settings))
    assert progress.forwards == 5 * (1 + 4) + 5
    assert progress.sample_forwards == 2 * progress.forwards


def test_search_splits_a_batch_without_changing_its_gradient(problem):
    """The loss is a mean over images, so gradients of equal parts average to that of all."""
    settings = replace(SETTINGS, warmup_steps=0, steps=1, loss=LossSettings(alpha=0.0))
    moved = [
        finish(replace(problem, settings=settings, images_at_once=size))[-1].outcome.scores
        for size in (None, 1)
    ]
    assert np.allclose(*moved, atol=1e-6) and np.ptp(moved[0][1:]) > 0


def test_search_refuses_the_state_of_another_search(problem):
    state = next(search_gates_stepwise(problem)).state()
    other = replace(problem, sampler=replace(SAMPLER, steps=4), resume=state)
    with pytest.raises(SearchError, match="belongs to another search"):
        finish(other)


def test_weight_of_a_call_is_what_skipping_it_costs_for_each_unit_it_changes(problem):
    """Oracle: the last DDIM call adds a multiple of the noise, the same for all images."""
    found, forwards, _ = measure_propagation(problem, 5)
    scheduler = noise_scheduler(problem.model, SAMPLER)
    last = int(scheduler.timesteps[-1])
    now, after = scheduler.alphas_cumprod[last], scheduler.final_alpha_cumprod
    factor = (1 - after).sqrt() - (after / now).sqrt() * (1 - now).sqrt()
    with torch.no_grad():
        final = rollout(problem.model, Batch(ITEMS[:2], (5, 6)), SAMPLER)
    scale = problem.model.pipe.vae.config.scaling_factor  # latents are divided by it at the end
    expected = float((factor.double() / scale) ** 2 / final.double().var())
    assert float(found.weights[-1]) == pytest.approx(expected, rel=1e-2)
    assert found.weights[0] == 0 and bool((found.weights[1:] > 0).all()) and forwards == 25
