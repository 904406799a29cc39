"""Trivial baselines: exact counts, even spacing, random tables within the budget."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo_core.baselines import (
    deepcache_gates,
    deepcache_schedules,
    equal_compute_calls,
    random_gates,
    uniform_calls,
)
from dipgo_core.blocks import known_graph
from dipgo_core.errors import ConfigError, TargetError
from dipgo_core.families import KNOWN_MODELS
from dipgo_core.gates import GateTable
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse


def chain(kind: Reuse, num_blocks: int = 5) -> BlockGraph:
    blocks = [Block("", Reuse.SKIP, 5, 5)]
    blocks += [Block(f"b{n}", kind, 19, 19) for n in range(num_blocks)]
    producers = ((num_blocks,), (INPUT,), *((n,) for n in range(1, num_blocks)))
    return BlockGraph("chain", "block", tuple(blocks), producers)


@pytest.mark.parametrize(
    ("target", "num_calls", "expected"),
    [(0.7, 10, 3), (0.3, 10, 7), (0.9, 10, 1), (0.8, 50, 10), (0.35, 10, 7), (0.0, 4, 4)],
)
def test_equal_compute_calls_has_no_float_slip(target, num_calls, expected):
    assert equal_compute_calls(target, num_calls) == expected


@given(percent=st.integers(0, 99), num_calls=st.integers(1, 100))
def test_equal_compute_calls_is_the_smallest_that_spends_as_much(percent, num_calls):
    calls = equal_compute_calls(percent / 100, num_calls)
    share = Fraction(100 - percent, 100)  # oracle: whole percents as fractions
    assert Fraction(calls, num_calls) >= share > Fraction(calls - 1, num_calls)


def test_equal_compute_calls_refuses_a_target_of_one():
    with pytest.raises(TargetError, match=r"in \[0, 1\), got 1\.0"):
        equal_compute_calls(1.0, 10)


def test_uniform_calls_starts_at_the_first_and_spreads():
    assert uniform_calls(3, 10) == (0, 3, 6)
    assert uniform_calls(10, 10) == tuple(range(10))
    with pytest.raises(ConfigError, match="between 1 and 10, got 0"):
        uniform_calls(0, 10)


@given(
    kind=st.sampled_from([Reuse.OUTPUT, Reuse.RESIDUAL]),
    percent=st.integers(0, 85),
    seed=st.integers(0, 9999),
)
@settings(deadline=None)
def test_random_gates_stays_below_the_budget_and_close_to_it(kind, percent, seed):
    graph = chain(kind)
    gates = random_gates(graph, percent / 100, 10, seed)
    ratio = graph.pruned_ratio(gates)
    assert percent / 100 - 1e-9 <= ratio < percent / 100 + 24 / 1000  # one block and ungated parts
    assert gates.keep[0].all() and graph.close(gates) == gates


def test_random_gates_repeats_by_seed_and_mixes_block_gates_with_calls():
    graph = chain(Reuse.RESIDUAL)
    tables = [random_gates(graph, 0.5, 10, seed) for seed in range(20)]
    assert tables[0] == random_gates(graph, 0.5, 10, 0) and len(set(tables)) == 20
    shares = [table.keep[1:].any(axis=1).mean() for table in tables]
    assert 0 < np.mean(shares) < 1  # some calls are skipped whole
    assert max(table.all_or_nothing_share for table in tables) < 1  # and some only in part


UNET = known_graph(next(known for known in KNOWN_MODELS if known.id == "tiny-sd"), "layer")


@pytest.mark.parametrize("target", [0.0, 0.3, 0.5, 0.7, 0.8, 0.95])
@pytest.mark.parametrize("num_calls", [4, 10, 20])
def test_deepcache_schedules_spend_at_least_the_budget_and_least_for_their_interval(
    target, num_calls
):
    """Oracle: all intervals and all 12 branches of SD's U-Net, priced from whole tables."""
    budget = (1 - Fraction(str(target))) * num_calls * UNET.call_macs()
    found = [
        (table.keep.all(1).tolist(), UNET.macs(table))
        for table in deepcache_schedules(UNET, num_calls, target)
    ]
    assert all(macs >= int(budget) for _, macs in found)
    spent = [
        UNET.macs(deepcache_gates(UNET, num_calls, interval, branch))
        for interval in range(1, num_calls + 1)
        for branch in range(12)
    ]
    least = min(macs for macs in spent if macs >= int(budget))
    assert least in [macs for _, macs in found]
    assert all(macs < budget + UNET.call_macs() or macs == least for _, macs in found)


def test_deepcache_at_half_of_the_compute_is_its_every_other_call():
    """Oracle: by hand, the outermost branch is the paper's first, and 5 of 10 calls are whole."""
    first = deepcache_schedules(UNET, 10, 0.5)[0]
    assert (first.keep == deepcache_gates(UNET, 10, 2, 0).keep).all()


def test_calls_without_guidance_count_half():
    """Oracle: by hand, 4 calls of 100 MACs, one of them skipped, the last two unguided."""
    graph = chain(Reuse.OUTPUT)
    table = GateTable.from_calls((0, 1, 2), 4, graph.num_blocks)
    assert graph.macs(table, guided=2) == 250
    assert graph.macs(table, guided=9) == graph.macs(table) == 300
