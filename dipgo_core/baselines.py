"""Gate tables of the trivial baselines, at the compute of a target. Pure, no torch."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from dipgo_core.config import Convention
from dipgo_core.errors import ConfigError
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.postprocess import budget_macs, kept_share, select_subnet


def equal_compute_calls(target: float, num_calls: int) -> int:
    """Return the smallest k with k / num_calls >= 1 - target: a baseline spends at least as much.

    Raises:
        TargetError: target is not in [0, 1).
    """
    return math.ceil(kept_share(target) * num_calls)


def uniform_calls(num_computed: int, num_calls: int) -> tuple[int, ...]:
    """Return the evenly spread calls floor(i * num_calls / num_computed).

    Raises:
        ConfigError: num_computed is not between 1 and num_calls.
    """
    if not 1 <= num_computed <= num_calls:
        raise ConfigError(f"computed calls must be between 1 and {num_calls}, got {num_computed}")
    return tuple(i * num_calls // num_computed for i in range(num_computed))


def random_gates(
    graph: BlockGraph,
    target: float,
    num_calls: int,
    seed: int,
    convention: Convention = "all",
) -> GateTable:
    """Draw a gate table that never spends more than the target's budget, and nearly all of it.

    Distribution: every searched gate after the first call gets an independent uniform score, and
    method `budget` turns the scores into a table as it does for a search. So block gates and (for
    transformers) skip gates are equally likely to fall first; in a U-Net whole calls fall when the
    last block does. What a search adds to this is its scores, nothing else.

    Raises:
        TargetError: no SubNet reaches the target.
    """
    scores = np.random.default_rng(seed).random((num_calls, graph.num_blocks))
    return select_subnet(scores, graph, target, convention=convention)


def deepcache_gates(graph: BlockGraph, calls: int, interval: int, branch: int) -> GateTable:
    """Return DeepCache's schedule as gates of granularity `layer`.

    Every `interval`-th call is whole; the others compute the layers above the branch alone
    (DeepCache, arXiv 2312.00858; the numbering of branches is its package's).
    """
    shallow = _shallow_row(graph, branch)
    return GateTable(np.array([shallow | (call % interval == 0) for call in range(calls)]))


def deepcache_schedules(
    graph: BlockGraph, num_calls: int, target: float, convention: Convention = "all"
) -> tuple[GateTable, ...]:
    """Return DeepCache schedules that spend at least what a SubNet of the target may.

    Each interval has the branch that spends the least of those; kept are intervals that spend less
    than one whole call above the budget (which fewer steps may, too), else the one nearest to it.
    The first has the most whole calls. There always is one: every call may be whole.
    """
    budget = budget_macs(graph, target, num_calls, convention)
    whole = graph.call_macs(convention)
    rows = (_shallow_row(graph, branch) for branch in range(_num_branches(graph)))
    shallow = [graph.row_macs(row, convention) for row in rows]
    cheapest: dict[int, tuple[int, int]] = {}  # interval -> MACs, branch
    for interval in _intervals(num_calls):
        computed = -(-num_calls // interval)
        spent = [computed * whole + (num_calls - computed) * macs for macs in shallow]
        enough = [(macs, branch) for branch, macs in enumerate(spent) if macs >= budget]
        if enough:
            cheapest[interval] = min(enough)
    least = min(macs for macs, _ in cheapest.values())
    return tuple(
        deepcache_gates(graph, num_calls, interval, branch)
        for interval, (macs, branch) in cheapest.items()
        if macs < budget + whole or macs == least
    )


def _intervals(num_calls: int) -> list[int]:
    """Return the intervals between whole calls, the smallest of each number of whole calls."""
    found: dict[int, int] = {}
    for interval in range(1, num_calls + 1):
        found.setdefault(-(-num_calls // interval), interval)
    return list(found.values())


def _num_branches(graph: BlockGraph) -> int:
    """Return how many skip connections DeepCache can cut at, that of the first layer included."""
    stages = {name.split(".")[1] for name in graph.names if name.startswith("up_blocks.")}
    return len(stages) * _layers_a_stage(graph)


def _layers_a_stage(graph: BlockGraph) -> int:
    return sum(name.startswith("up_blocks.0.resnets.") for name in graph.names)


def _shallow_row(graph: BlockGraph, branch: int) -> npt.NDArray[np.bool_]:
    """Return the layers that a call computes when it is not whole.  # (N,)"""
    place = divmod(branch, _layers_a_stage(graph))
    return np.array([not name or _is_above(graph, name, place) for name in graph.names])


def _is_above(graph: BlockGraph, name: str, place: tuple[int, int]) -> bool:
    """Return whether a layer lies above a branch. place: its stage from outside, layer in it."""
    side, *rest = name.split(".")
    if side == "mid_block":
        return False
    stage, kind, layer = int(rest[0]), rest[1], int(rest[2])
    siblings = [n for n in graph.names if n.startswith(f"{side}.{stage}.resnets.")]
    if side == "down_blocks":
        return (stage, len(siblings) if kind == "downsamplers" else layer) < place
    stages = {n.split(".")[1] for n in graph.names if n.startswith("up_blocks.")}
    from_end = 0 if kind == "upsamplers" else len(siblings) - 1 - layer
    return (len(stages) - 1 - stage, from_end) <= place
