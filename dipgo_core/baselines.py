"""Gate tables of the trivial baselines, at the compute of a target. Pure, no torch."""

from __future__ import annotations

import math

import numpy as np

from dipgo_core.config import Convention
from dipgo_core.errors import ConfigError
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.postprocess import kept_share, select_subnet


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
