"""Scores of all gates from those that a search learned; which gates decide anything at all."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dipgo_core.graph import BlockGraph

#: A gate that was dead for this last share of the search has no score of its own.
DEAD_SHARE = 0.5


def final_scores(
    p_keep: npt.NDArray[np.float64],
    last_needed: npt.NDArray[np.int64],
    num_steps: int,
    graph: BlockGraph,
) -> npt.NDArray[np.float64]:
    """Return scores of all gates from p_keep of the searched ones.  # (T, S) -> (T, N)

    last_needed: (T, S), the last search step at which the gate decided anything. A gate that was
    dead throughout the last half was pushed by sparsity alone: its score says nothing, and it
    takes the score of the gate that killed it. A skip gate that a block implies takes the score
    of that block in the same way.
    """
    scores = np.zeros((len(p_keep), graph.num_blocks))
    known = np.zeros(scores.shape, dtype=np.bool_)
    scores[:, graph.searched] = p_keep
    known[:, graph.searched] = last_needed >= (1 - DEAD_SHARE) * num_steps
    for row, own in zip(scores[1:], known[1:], strict=True):
        row[~own] = _needed_up_to(np.where(own, row, np.inf), graph)[~own]
    scores[0] = 1.0
    return scores


def _needed_up_to(row: npt.NDArray[np.float64], graph: BlockGraph) -> npt.NDArray[np.float64]:
    """Return the highest threshold at which each gate would decide something.  # (N,)"""
    reach = np.zeros(graph.num_blocks)
    for threshold in np.unique(row[np.isfinite(row)]):
        kept = row >= threshold
        kept[0] |= 0 not in graph.searched
        reach[needed_gates(kept, graph)] = threshold
    return reach


def needed_gates(row: npt.NDArray[np.bool_], graph: BlockGraph) -> npt.NDArray[np.bool_]:
    """Return which gates decide something: they would be live if kept.  # (N,)"""
    needed = np.zeros(graph.num_blocks, dtype=np.bool_)
    for n in range(graph.num_blocks):
        kept = row.copy()
        kept[n] = True
        needed[n] = graph.live(kept)[n]
    return needed
