"""Post-processing: budgets hold, closures are canonical, targets are exact or refused."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_core.errors import ConfigError, TargetError
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse
from dipgo_core.outcome import SearchOutcome
from dipgo_core.postprocess import affordable_calls, select, select_subnet


def unet_graph(costs: tuple[int, ...] = (10, 30, 20, 5, 20, 50)) -> BlockGraph:
    """Ungated parts, two down, mid, two up with skip connections: the last up feeds the output."""
    names = ("", "down0", "down1", "mid", "up0", "up1")
    kinds = (Reuse.SKIP, *(Reuse.OUTPUT,) * 5)
    blocks = tuple(
        Block(name, kind, cost, cost) for name, kind, cost in zip(names, kinds, costs, strict=True)
    )
    return BlockGraph("unet", "block", blocks, ((5,), (INPUT,), (1,), (2,), (3, 2), (4, 1)))


def dit_graph(num_blocks: int = 4) -> BlockGraph:
    blocks = (Block("", Reuse.SKIP, 7, 7),) + tuple(
        Block(f"b{n}", Reuse.RESIDUAL, 20, 18) for n in range(num_blocks)
    )
    chain = ((num_blocks,), (INPUT,), *((n,) for n in range(1, num_blocks)))
    return BlockGraph("dit", "block", blocks, chain)


@st.composite
def graphs(draw: st.DrawFn) -> BlockGraph:
    """Random forward-connected graphs with both kinds of reuse."""
    size = draw(st.integers(1, 5))
    kind = st.sampled_from([Reuse.OUTPUT, Reuse.RESIDUAL])
    blocks = [Block("", Reuse.SKIP, draw(st.integers(0, 9)), 0)]
    producers: list[tuple[int, ...]] = []
    for n in range(1, size + 1):
        blocks.append(Block(f"b{n}", draw(kind), draw(st.integers(1, 50)), 1))
        earlier = st.sampled_from([INPUT, *range(1, n)])
        producers.append(tuple(sorted(draw(st.sets(earlier, min_size=1, max_size=3)))))
    output = set(range(1, size + 1)) - {n for row in producers for n in row}  # read by no block
    return BlockGraph("random", "block", tuple(blocks), (tuple(sorted(output)), *producers))


@given(graph=graphs(), num_calls=st.integers(1, 6), seed=st.integers(0, 999), share=st.data())
@settings(max_examples=200, deadline=None)
def test_budget_is_never_exceeded_and_table_is_canonical(graph, num_calls, seed, share):
    target = share.draw(st.floats(0, 1 - 1 / num_calls, exclude_max=num_calls > 1))
    scores = np.random.default_rng(seed).random((num_calls, graph.num_blocks)).round(1)
    gates = select_subnet(scores, graph, target)
    allowed = (1 - Fraction(repr(target))) * num_calls * graph.call_macs()
    assert graph.macs(gates) <= allowed
    assert graph.close(gates) == gates
    assert gates.keep[0].all() and graph.pruned_ratio(gates) >= target - 1e-12


@given(graph=graphs(), seed=st.integers(0, 999))
@settings(max_examples=50, deadline=None)
def test_every_target_below_a_reachable_one_is_reachable_and_keeps_no_less_budget(graph, seed):
    scores = np.random.default_rng(seed).random((4, graph.num_blocks))
    for target in (0.75, 0.5, 0.3, 0.1, 0.0):
        gates = select_subnet(scores, graph, target)
        assert graph.pruned_ratio(gates) >= target - 1e-12
    assert gates.keep.all() or graph.pruned_ratio(gates) == 0


@pytest.mark.parametrize("graph", [unet_graph(), dit_graph()], ids=["unet", "dit"])
@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7])
def test_budget_leaves_no_gate_that_would_fit(graph, target):
    scores = np.random.default_rng(3).random((10, graph.num_blocks))
    gates = select_subnet(scores, graph, target)
    left = (1 - target) * 10 * graph.call_macs() - graph.macs(gates)
    for t, n in zip(*np.nonzero(~gates.keep), strict=True):  # oracle: try every single gate
        row = gates.keep[t].copy()
        row[n] = row[0] = True
        extra = graph.row_macs(row) - graph.row_macs(gates.keep[t])
        assert extra == 0 or not graph.live(row)[n] or extra > left


def test_budget_gives_back_the_best_score_that_fits():
    graph = dit_graph(2)  # a call costs 47: 7 ungated, 20 a block
    scores = np.array([[1, 1, 1], [0.9, 0.8, 0.2], [0.9, 0.3, 0.2]])
    gates = select_subnet(scores, graph, 1 - 101 / 141)  # 47 + 27 + 27, all gates above .3
    assert gates.to_strings() == ["111", "110", "110"]


def test_budget_fills_ties_up_to_the_output_side_first():
    graph = unet_graph((0, 10, 10, 10, 10, 10))
    gates = select_subnet(np.full((2, 6), 0.5), graph, 0.4)  # 60 of 100: one block of call 1
    assert gates.to_strings() == ["111111", "100001"]


@pytest.mark.parametrize("target", [0.2, 0.4, 0.6])
def test_paper_ends_within_its_tolerance(target):
    graph = unet_graph()
    scores = np.random.default_rng(0).random((50, 6))
    gates = select_subnet(scores, graph, target, method="paper")
    assert abs(graph.pruned_ratio(gates) - target) < 0.0125
    assert graph.close(gates) == gates


def test_paper_names_the_ratios_next_to_a_gap():
    scores = np.full((4, 6), 0.5)
    with pytest.raises(TargetError, match=r"from a pruned ratio of 0\.0000 to 0\.7500"):
        select_subnet(scores, unet_graph(), 0.5, method="paper")


@pytest.mark.parametrize("target", [0.2, 0.4, 0.6])
def test_released_ends_just_under_the_target(target):
    graph = unet_graph()
    scores = np.random.default_rng(1).random((50, 6))
    gates = select_subnet(scores, graph, target, method="released")
    assert target - 0.0125 < graph.pruned_ratio(gates) <= target
    assert graph.close(gates) == gates


def test_released_removes_last_blocks_and_surest_calls_first():
    scores = np.full((4, 6), 0.04)
    scores[1, 5], scores[3, 5] = 0.01, 0.02
    gates = select_subnet(scores, unet_graph(), 0.5, method="released")
    assert gates.to_strings() == ["111111", "000000", "111111", "000000"]


@pytest.mark.parametrize("method", ["budget", "paper", "released"])
def test_unreachable_target_lists_reachable_ratios(method):
    scores = np.random.default_rng(0).random((4, 6))
    with pytest.raises(TargetError, match=r"at most 0\.75 can be pruned.*0, 0\.25, 0\.5, 0\.75"):
        select_subnet(scores, unet_graph(), 0.8, method=method)


def test_convention_decides_what_is_counted():
    blocks = (Block("", Reuse.SKIP, 10, 0), Block("b", Reuse.RESIDUAL, 10, 10))
    graph = BlockGraph("d", "block", blocks, ((1,), (INPUT,)))
    scores = np.array([[1, 1], [0.5, 0.2]])
    assert select_subnet(scores, graph, 0.5, convention="all").to_strings() == ["11", "00"]
    assert select_subnet(scores, graph, 0.5, convention="paper").to_strings() == ["11", "10"]
    assert select_subnet(scores, graph, 0.25, convention="all").to_strings() == ["11", "10"]


def test_score_of_an_implied_skip_gate_is_ignored():
    scores = np.random.default_rng(2).random((6, 6))
    other = scores.copy()
    other[:, 0] = 0
    for method in ("budget", "released"):
        one = select_subnet(scores, unet_graph(), 0.4, method=method)
        assert one == select_subnet(other, unet_graph(), 0.4, method=method)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'budget'"):
        select_subnet(np.ones((2, 6)), unet_graph(), 0.1, method="budgte")  # type: ignore[arg-type]


def test_affordable_calls_is_exact_where_floats_slip():
    assert affordable_calls(0.7, 10) == 3  # (1 - 0.7) * 10 is 3.0000000000000004
    assert affordable_calls(0.9, 10) == 1  # (1 - 0.9) * 10 is 0.9999999999999998
    assert affordable_calls(0.35, 10) == 6


def test_select_takes_the_step_mask_that_fits():
    outcome = SearchOutcome(step_masks={1: (0,), 2: (0, 3), 3: (0, 2, 4)}, forwards=9)
    gates = select(outcome, unet_graph(), 0.45, num_calls=5)
    assert gates.to_strings() == ["111111", "000000", "000000", "111111", "000000"]


def test_select_refuses_an_outcome_of_another_sampler():
    outcome = SearchOutcome(scores=np.ones((5, 6)))
    with pytest.raises(ConfigError, match="scored 5 calls, the sampler makes 10"):
        select(outcome, unet_graph(), 0.3, num_calls=10)
