"""BlockGraph: liveness against brute force, closure, MACs of a table."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dipgo_core.errors import SubNetError
from dipgo_core.gates import GateTable
from dipgo_core.graph import INPUT, Block, BlockGraph, Reuse


def random_graph(seed: int) -> BlockGraph:
    """Up to six blocks, each reading one to three earlier ones or the input."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    producers: list[tuple[int, ...]] = []
    for n in range(1, count + 1):
        choices = np.array([INPUT, *range(1, n)])
        size = min(len(choices), int(rng.integers(1, 4)))
        producers.append(tuple(int(p) for p in rng.choice(choices, size, replace=False)))
    output = tuple({count, int(rng.choice([INPUT, *range(1, count + 1)]))})
    kinds = rng.choice([Reuse.OUTPUT, Reuse.RESIDUAL], count)
    macs = rng.integers(1, 100, count + 1)
    blocks = [Block("", Reuse.SKIP, int(macs[0]), 0)]
    blocks += [Block(f"b{n}", Reuse(kinds[n - 1]), int(macs[n]), 0) for n in range(1, count + 1)]
    return BlockGraph("Random", "block", tuple(blocks), (output, *producers))


def values_of(graph: BlockGraph, row: tuple[bool, ...], ran: frozenset[int]) -> object:
    """The output as an expression, where kept blocks outside `ran` give rubbish."""
    value: dict[int, object] = {INPUT: "now"}
    for n in range(1, graph.num_blocks):
        inputs = tuple(value[p] for p in graph.producers[n])
        if row[n]:
            value[n] = ("computed", n, inputs) if n in ran else ("rubbish", n)
        elif graph.blocks[n].reuse is Reuse.RESIDUAL:
            value[n] = ("changed", n, inputs)
        else:
            value[n] = ("cached", n)
    return tuple(value[p] for p in graph.producers[0])


def live_by_brute_force(graph: BlockGraph, row: tuple[bool, ...]) -> frozenset[int]:
    """The smallest set of kept blocks that must run for the output to be what it is."""
    kept = [n for n in range(1, graph.num_blocks) if row[n]]
    whole = values_of(graph, row, frozenset(kept))
    for size in range(len(kept) + 1):
        for ran in map(frozenset, itertools.combinations(kept, size)):
            if values_of(graph, row, ran) == whole:
                return ran
    raise AssertionError("unreachable")


@pytest.mark.parametrize("seed", range(40))
def test_live_equals_brute_force(seed: int) -> None:
    graph = random_graph(seed)
    for bits in itertools.product((False, True), repeat=graph.num_blocks - 1):
        row = (True, *bits)
        live = graph.live(np.array(row))
        assert set(np.flatnonzero(live[1:]) + 1) == live_by_brute_force(graph, row)
        output = str(values_of(graph, row, frozenset(range(9))))
        assert live[0] == ("now" in output or "computed" in output)


def chain(reuse: Reuse) -> BlockGraph:
    """input -> 1 -> 2 -> output, the output modulated by the input when residual."""
    blocks = (
        Block("", Reuse.SKIP, 10, 1),
        Block("a", reuse, 20, 2, ("x",) if reuse is Reuse.RESIDUAL else ()),
        Block("b", reuse, 70, 7, ("x",) if reuse is Reuse.RESIDUAL else ()),
    )
    output = (INPUT, 2) if reuse is Reuse.RESIDUAL else (2,)
    return BlockGraph("Chain", "block", blocks, (output, (INPUT,), (1,)))


def test_close_lets_producers_of_reused_outputs_die() -> None:
    closed = chain(Reuse.OUTPUT).close(GateTable.from_strings(["111", "110", "101", "011"]))
    assert closed.to_strings() == ["111", "000", "101", "000"]


def test_close_keeps_what_residual_reuse_passes_through() -> None:
    closed = chain(Reuse.RESIDUAL).close(GateTable.from_strings(["111", "110", "100"]))
    assert closed.to_strings() == ["111", "110", "100"]


def test_macs_charge_live_blocks_and_the_ungated_rest() -> None:
    gates = GateTable.from_strings(["111", "101", "110"])
    assert chain(Reuse.OUTPUT).macs(gates) == 100 + 80
    assert chain(Reuse.RESIDUAL).macs(gates) == 100 + 80 + 30
    assert chain(Reuse.RESIDUAL).macs(gates, "paper") == 10 + 8 + 3
    assert chain(Reuse.OUTPUT).pruned_ratio(gates) == pytest.approx(0.4)


def test_savings_include_the_closure() -> None:
    assert chain(Reuse.OUTPUT).savings() == pytest.approx([1, 0.2, 1])
    assert chain(Reuse.RESIDUAL).savings() == pytest.approx([1, 0.2, 0.7])


def test_searched_leaves_out_a_skip_gate_that_a_block_implies() -> None:
    assert chain(Reuse.OUTPUT).searched == (1, 2)
    assert chain(Reuse.RESIDUAL).searched == (0, 1, 2)


def random_gates(graph: BlockGraph, seed: int, calls: int = 6) -> GateTable:
    keep = np.random.default_rng(seed).random((calls, graph.num_blocks)) < 0.6
    keep[0] = True
    return GateTable(keep)


def cached_names(value: object) -> set[int]:
    """Which blocks' cached outputs an expression of `values_of` mentions."""
    if not isinstance(value, tuple):
        return set()
    own = {value[1]} if value[:1] in (("cached",), ("changed",)) else set()
    return own.union(*map(cached_names, value))


@pytest.mark.parametrize("seed", range(20))
def test_reads_are_the_cached_outputs_in_the_output(seed: int) -> None:
    graph = random_graph(seed)
    for bits in itertools.product((False, True), repeat=graph.num_blocks - 1):
        row = np.array((True, *bits))
        expected = cached_names(values_of(graph, tuple(row.tolist()), frozenset(range(9))))
        reads = set(np.flatnonzero(graph.reads(row)).tolist())
        assert reads == (expected if graph.live(row)[0] else {0})


@pytest.mark.parametrize("seed", range(20))
def test_schedule_holds_only_what_a_later_call_takes(seed: int) -> None:
    """Oracle: at every moment, look ahead for a read that comes before the next computation."""
    graph = random_graph(seed)
    gates = random_gates(graph, seed)
    schedule, sizes = graph.schedule(gates), [3, 5, 7, 11, 13, 17, 19][: graph.num_blocks]
    events = [(c, n) for c in range(gates.num_calls) for n in (*range(1, graph.num_blocks), 0)]
    live = [np.ones(graph.num_blocks, bool), *(graph.live(row) for row in gates.keep[1:])]
    reads = [graph.reads(row) if c else ~live[0] for c, row in enumerate(gates.keep)]

    def wanted(n: int, after: int) -> bool:
        ahead = [call for call, block in events[after + 1 :] if block == n]
        used = [call for call in ahead if live[call][n] or reads[call][n]]
        return bool(used) and bool(reads[used[0]][n])

    computed, held, peak = set[int](), set[int](), 0
    rows = (schedule.whole[0], *schedule.rows[1:])
    for place, (call, n) in enumerate(events):
        computed |= {n} if live[call][n] else set()
        held = held | {n} if rows[call].stores[n] else held
        held = held - {n} if rows[call].frees[n] else held
        assert held == {b for b in computed if wanted(b, place_of(events, b, place))}
        peak = max(peak, sum(sizes[b] for b in held))
    assert graph.peak_cache(gates, sizes) == peak


def place_of(events: list[tuple[int, int]], block: int, place: int) -> int:
    """The last event of a block up to a place."""
    return max(p for p in range(place + 1) if events[p][1] == block)


def test_a_run_may_start_whole_at_any_call() -> None:
    gates = GateTable.from_strings(["111", "101", "000", "110"])
    schedule = chain(Reuse.RESIDUAL).schedule(gates)
    assert schedule.whole[1].stores == (True, False, True)
    assert schedule.whole[3].stores == (False, False, False)
    assert all(all(row.computes) for row in schedule.whole)


def test_check_refuses_a_table_of_another_width() -> None:
    with pytest.raises(SubNetError, match="2 gates a call, Chain has 3"):
        chain(Reuse.OUTPUT).macs(GateTable.all_keep(2, 2))


@pytest.mark.parametrize("reuse", [Reuse.OUTPUT, Reuse.RESIDUAL])
def test_json_round_trips(reuse: Reuse) -> None:
    graph = chain(reuse)
    assert BlockGraph.from_json(graph.to_json()) == graph
