"""The paper's search: resumes to the same result, refuses what is not finite, scores honestly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from tiny import tiny_dit, tiny_model, tiny_sd

from dipgo_core.config import LossSettings, SamplerSettings, SearchSettings
from dipgo_core.errors import SearchDivergedError, SearchError
from dipgo_core.items import Item
from dipgo_core.pipelines import block_graph
from dipgo_core.postprocess import select
from dipgo_core.sampling import Batch, rollout
from dipgo_core.search import STRATEGIES, SearchProblem, SearchProgress
from dipgo_core.search.dipgo import search_gates
from dipgo_core.search.scores import final_scores, needed_gates
from dipgo_core.search.training import learning_rate
from dipgo_core.strategies import READS

SAMPLER = SamplerSettings(scheduler="ddim", steps=4, guidance_scale=3.0)
ITEMS = (Item("a red cat", 1), Item("the blue moon", 2), Item("a dog", 3))
SETTINGS = SearchSettings(
    steps=12, warmup_steps=2, learning_rate=3.0, query_dim=16, batch_size=2, seed=3
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
    return list(search_gates(problem))


def test_search_moves_gates_and_its_scores_serve_targets(problem):
    steps = finish(problem)
    first, last = steps[0], steps[-1]
    assert [p.search_step for p in steps] == list(range(1, 13))
    assert first.compute_ratio == 1 and first.sparsity == pytest.approx(1)
    assert first.consistency == pytest.approx(0, abs=1e-5)
    assert sum(p.flips for p in steps) > 0 and last.outcome is not None
    assert all(p.outcome is None for p in steps[:-1])
    for target in (0.25, 0.5, 0.75):
        gates = select(last.outcome, problem.graph, target, num_calls=4)
        assert problem.graph.pruned_ratio(gates) >= target - 1e-12


def test_search_resumed_from_safetensors_equals_the_uninterrupted_one(problem):
    whole = finish(problem)
    for progress in search_gates(problem):
        if progress.search_step == 5:
            saved = load(save(progress.state()))
            break
    resumed = finish(replace(problem, resume=saved))
    assert [p.search_step for p in resumed] == list(range(6, 13))
    assert [p.loss for p in resumed] == [p.loss for p in whole[5:]]
    assert np.array_equal(resumed[-1].outcome.scores, whole[-1].outcome.scores)
    assert resumed[-1].outcome.forwards == whole[-1].outcome.forwards


def test_search_resumed_after_its_last_step_repeats_its_last_record(problem):
    last = finish(problem)[-1]
    (again,) = search_gates(replace(problem, resume=load(save(last.state()))))
    assert again.to_json() == last.to_json()
    assert np.array_equal(again.outcome.scores, last.outcome.scores)


def test_search_takes_dense_latents_that_are_there(problem):
    with torch.no_grad():
        dense = rollout(problem.model, Batch(ITEMS, problem.seeds), SAMPLER)
    given, computed = finish(replace(problem, dense_latents=dense))[-1], finish(problem)[-1]
    assert np.allclose(given.outcome.scores, computed.outcome.scores, atol=1e-4)
    assert computed.forwards - given.forwards == 2 * 4  # two batches of the dense model


@pytest.mark.parametrize("encoder", ["linear", "none"])
def test_search_runs_with_every_encoder_and_accumulation(problem, encoder):
    settings = replace(SETTINGS, steps=3, encoder=encoder, accumulation=2, batch_size=1)
    last = finish(replace(problem, settings=settings))[-1]
    assert last.outcome.scores.shape == (4, problem.graph.num_blocks)


def test_search_names_the_step_of_a_loss_that_is_not_finite(problem):
    settings = replace(SETTINGS, loss=LossSettings(consistency={"l2": 1.0}))
    bad = torch.full((3, 4, 8, 8), float("nan"))
    with pytest.raises(SearchError, match="search step 1 of 12.*not finite"):
        finish(replace(problem, settings=settings, dense_latents=bad))


def test_search_refuses_the_state_of_another_search(problem):
    state = next(search_gates(problem)).state()
    other = replace(SETTINGS, query_dim=32)
    with pytest.raises(SearchError, match="belongs to another search"):
        finish(replace(problem, settings=other, resume=state))


def test_search_refuses_seeds_that_do_not_match_the_items(problem):
    with pytest.raises(SearchError, match="3 items, 2 seeds"):
        finish(replace(problem, seeds=(1, 2)))


def test_search_in_half_precision_learns_what_float32_learns():
    scores = []
    for dtype in (torch.float32, torch.float16):
        model = tiny_model(tiny_dit().to(dtype))
        settings = replace(SETTINGS, steps=3, loss=LossSettings(alpha=0.0))
        problem = SearchProblem(
            model=model,
            graph=block_graph(model),
            sampler=SAMPLER,
            settings=settings,
            items=ITEMS,
            seeds=(5, 6, 7),
            dense_latents=torch.zeros(3, 4, 8, 8, dtype=dtype),  # off the minimum: a real gradient
        )
        scores.append(finish(problem)[-1].outcome.scores)
    moved = np.abs(scores[0][1:] - scores[0][1:].mean()).max()
    assert moved > 0 and np.abs(scores[0] - scores[1]).max() < 0.2 * moved


def test_tau_stops_the_pull_towards_sparsity(problem):
    loss = LossSettings(tau=0.5, consistency={"l2": 1e-9})
    steps = finish(replace(problem, settings=replace(SETTINGS, steps=25, loss=loss)))
    below = [p for p in steps if p.compute_ratio <= 0.5]
    assert below and all(p.loss == pytest.approx(p.consistency) for p in below)


def test_learning_rate_warms_up_from_zero_and_falls_to_zero():
    settings = SearchSettings(steps=110, warmup_steps=10, learning_rate=0.1)
    rates = [learning_rate(step, settings) for step in range(111)]
    assert rates[0] == 0 and rates[5] == pytest.approx(0.05) and max(rates) == rates[10] == 0.1
    assert rates[60] == pytest.approx(0.05) and rates[110] == pytest.approx(0, abs=1e-12)


def test_score_of_a_gate_that_was_dead_is_its_killers():
    graph = block_graph(tiny_model(tiny_sd()))
    p_keep = np.full((2, 9), 0.4)
    p_keep[1, 8] = 0.1  # the last up block kills all others
    last_needed = np.full((2, 9), 10)
    last_needed[1, :8] = 2  # dead ever since step 2 of 10
    scores = final_scores(p_keep, last_needed, 10, graph)
    assert (scores[0] == 1).all()
    assert scores[1].tolist() == [0.1] * 10  # the implied skip gate too


def test_score_of_a_gate_that_died_late_is_its_own():
    graph = block_graph(tiny_model(tiny_dit()))
    p_keep = np.array([[1.0] * 5, [0.3, 0.8, 0.7, 0.6, 0.5]])
    scores = final_scores(p_keep, np.full((2, 5), 8), 10, graph)
    assert scores[1].tolist() == [0.3, 0.8, 0.7, 0.6, 0.5]


def test_needed_gates_are_those_whose_flip_matters():
    graph = block_graph(tiny_model(tiny_sd()))
    row = np.ones(10, dtype=np.bool_)
    row[8] = False  # up_blocks.2 reuses: only it, up_blocks.3 and down_blocks.0 matter
    needed = [graph.names[n] for n in np.flatnonzero(needed_gates(row, graph)) if n]
    assert needed == ["down_blocks.0", "up_blocks.2", "up_blocks.3"]


def test_registry_knows_the_strategies_that_planning_knows():
    assert set(STRATEGIES) == set(READS)


def gradients(problem: SearchProblem) -> list[torch.Tensor]:
    """Return how one search step moved each weight of the pruner."""
    before = next(search_gates(replace(problem, settings=replace(SETTINGS, learning_rate=0.0))))
    after = next(search_gates(problem))
    names = [name for name in after.state() if name.startswith("pruner.")]
    return [after.state()[name] - before.state()[name] for name in names]


def test_search_splits_a_batch_without_changing_its_gradient(problem):
    """The loss is a mean over images, so gradients of equal parts average to that of all."""
    settings = replace(SETTINGS, warmup_steps=0, learning_rate=1.0, weight_decay=0.0)
    whole = replace(problem, settings=settings)
    split = replace(whole, images_at_once=1)
    assert any(bool(moved.abs().max() > 0) for moved in gradients(whole))
    for one, other in zip(gradients(whole), gradients(split), strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-3)


def test_search_refuses_parts_that_are_not_equal(problem):
    with pytest.raises(SearchError, match="divisor"):
        next(search_gates(replace(problem, images_at_once=3)))


def test_search_moves_alike_whether_calls_are_computed_again(problem):
    settings = replace(SETTINGS, warmup_steps=0, learning_rate=1.0)
    kept, again = (
        gradients(replace(problem, settings=settings, checkpoint_calls=on)) for on in (False, True)
    )
    for one, other in zip(kept, again, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(("sampling", "start"), [("gumbel", "keep"), ("none", "random")])
def test_search_resumes_exactly_with_sampled_gates_and_other_starts(problem, sampling, start):
    settings = replace(SETTINGS, steps=4, sampling=sampling, start=start)
    whole = finish(replace(problem, settings=settings))
    state = next(search_gates(replace(problem, settings=settings))).state()
    resumed = finish(replace(problem, settings=settings, resume=load(save(state))))
    assert whole[0].consistency > 0  # a gradient from the first step on
    assert [p.loss for p in resumed] == [p.loss for p in whole[1:]]


def test_search_that_diverges_leaves_the_scores_of_its_last_good_step(problem):
    settings = replace(SETTINGS, steps=3, start="random", warmup_steps=0)
    bad = replace(SETTINGS.loss, consistency={"l2": 1.0})
    progress = search_gates(replace(problem, settings=replace(settings, loss=bad)))
    first = next(progress)
    progress.close()  # takes its hooks away
    broken = replace(
        problem,
        settings=replace(settings, loss=bad),
        resume=first.state(),
        dense_latents=torch.full((3, 4, 8, 8), float("nan")),
    )
    with pytest.raises(SearchDivergedError, match="gates of step 1 are the last good") as caught:
        finish(broken)
    assert caught.value.outcome.scores.shape == (4, problem.graph.num_blocks)
