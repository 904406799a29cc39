"""From scores and a target to a gate table: `budget` (ours), `paper`, `released`. Pure, no torch.

One search serves every target (arXiv 2410.16942, section 3, "once for all"). In all methods the
first call is computed whole and the result is canonical (``BlockGraph.close``).
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from dipgo_core.config import Convention, Postprocess
from dipgo_core.errors import ConfigError, TargetError, nearest
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph, bits_of, row_of
from dipgo_core.outcome import SearchOutcome

#: Stop of the paper's bisection: |pruned ratio - target| below this.
PAPER_TOLERANCE = 0.0125
#: Thresholds on p_reuse of the released code: 0.95, 0.90, ..., 0.
RELEASED_THRESHOLDS = tuple(percent / 100 for percent in range(95, -1, -5))

Scores = npt.NDArray[np.float64]
Keep = npt.NDArray[np.bool_]


def kept_share(target: float) -> Fraction:
    """Return 1 - target, exact in the decimal the user wrote (0.7 leaves 3/10, no float slip).

    Raises:
        TargetError: target is not in [0, 1).
    """
    if not 0 <= target < 1:
        raise TargetError(f"target (pruned ratio) must be in [0, 1), got {target}")
    return 1 - Fraction(repr(float(target)))


def affordable_calls(target: float, num_calls: int) -> int:
    """Return the largest number of whole calls within the budget of `target`.

    Raises:
        TargetError: the target is below one call, which no SubNet reaches.
    """
    calls = int(kept_share(target) * num_calls)
    if calls < 1:
        raise _unreachable(target, num_calls)
    return calls


def budget_macs(graph: BlockGraph, target: float, num_calls: int, convention: Convention) -> int:
    """Return the MACs a SubNet of `target` may spend over all calls, batch 1."""
    return int(kept_share(target) * num_calls * graph.call_macs(convention))


def select(
    outcome: SearchOutcome,
    graph: BlockGraph,
    target: float,
    *,
    num_calls: int,
    method: Postprocess = "budget",
    convention: Convention = "all",
) -> GateTable:
    """Return the gate table of one target from what a search found.

    Step masks serve a target with as many whole calls as its budget holds, tables those that were
    searched for; `method` only matters for scores.

    Raises:
        TargetError: no SubNet reaches the target.
        ConfigError: unknown method, or an outcome made for another number of calls or blocks.
    """
    if outcome.tables is not None:
        return _table(outcome.tables, outcome.extrapolations, target)
    if outcome.step_masks is not None:
        mask = outcome.step_masks.get(affordable_calls(target, num_calls))
        if mask is None:
            raise ConfigError(
                f"the search holds step masks for {sorted(outcome.step_masks)} computed calls, "
                f"none for target {target} at {num_calls} calls: search again with this sampler"
            )
        return GateTable.from_calls(mask, num_calls, graph.num_blocks)
    assert outcome.scores is not None
    if outcome.scores.shape[0] != num_calls:
        raise ConfigError(
            f"the search scored {outcome.scores.shape[0]} calls, the sampler makes {num_calls}: "
            "search again with this sampler"
        )
    return select_subnet(outcome.scores, graph, target, method=method, convention=convention)


def _table(
    tables: Mapping[float, tuple[str, ...]], extrapolations: Mapping[float, float], target: float
) -> GateTable:
    if target not in tables:
        raise ConfigError(
            f"the search holds SubNets of the targets {', '.join(map(str, tables))}, none of "
            f"{target}: search again with this target"
        )
    return GateTable.from_strings(tables[target], extrapolations.get(target, 0.0))


def select_subnet(
    scores: Scores,
    graph: BlockGraph,
    target: float,
    *,
    method: Postprocess = "budget",
    convention: Convention = "all",
) -> GateTable:
    """Return the gate table that `scores` (T, N) select for a pruned ratio of `target`.

    `budget` never spends more than (1 - target) of the dense MACs; `paper` ends within 0.0125 of
    the target on either side; `released` ends at or just under the target.

    Raises:
        TargetError: no SubNet reaches the target.
        ConfigError: unknown method, or scores of another graph.
    """
    if method not in METHODS:
        raise ConfigError(
            f"postprocess must be one of {', '.join(METHODS)}, got {method!r}."
            + nearest(method, tuple(METHODS))
        )
    if scores.ndim != 2 or scores.shape[1] != graph.num_blocks:
        raise ConfigError(
            f"scores must be (calls, {graph.num_blocks}) for {graph.denoiser}, got {scores.shape}"
        )
    affordable_calls(target, scores.shape[0])  # raises where even one whole call is too much
    return METHODS[method](_with_fixed_gates(scores, graph), graph, target, convention)


def _unreachable(target: float, num_calls: int) -> TargetError:
    highest = 1 - Fraction(1, num_calls)
    whole = ", ".join(f"{1 - k / num_calls:.4g}" for k in range(num_calls, 0, -1)[:12])
    return TargetError(
        f"target {target} cannot be reached with {num_calls} calls: the first call is computed "
        f"whole, so at most {float(highest):.6g} can be pruned. Reachable with whole calls: {whole}"
        + (", ..." if num_calls > 12 else "")
        + ". Lower the target or take more sampling steps."
    )


def _with_fixed_gates(scores: Scores, graph: BlockGraph) -> Scores:
    """Lift what nobody decides above every threshold: the first call, an implied skip gate."""
    fixed = np.array(scores, dtype=np.float64)
    fixed[0] = np.inf
    implied = [n for n in range(graph.num_blocks) if n not in graph.searched]
    fixed[:, implied] = np.inf
    return fixed


def _at_threshold(scores: Scores, threshold: float, graph: BlockGraph) -> GateTable:
    return graph.close(GateTable(scores >= threshold))


def _budget(scores: Scores, graph: BlockGraph, target: float, convention: Convention) -> GateTable:
    """Lowest threshold within the budget, then the best-scoring gates that still fit."""
    budget = budget_macs(graph, target, len(scores), convention)
    thresholds = np.unique(scores)  # ascending; the last is inf: only the first call
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        kept = bits_of(scores >= thresholds[middle])
        fits = sum(graph.priced(row, convention)[1] for row in kept) <= budget
        low, high = (low, middle) if fits else (middle + 1, high)
    start = _at_threshold(scores, thresholds[low], graph)
    return _give_back(start, scores, graph, budget, convention)


def _give_back(
    gates: GateTable, scores: Scores, graph: BlockGraph, budget: int, convention: Convention
) -> GateTable:
    """Compute further gates, best score first, as long as they are live and fit the budget.

    A gate that would be dead, or too dear, waits until another gate of its call is given back.
    Ties go to the later block, which is the one nearer to the output.
    """
    rows, costs = bits_of(gates.keep), graph.costs(convention).tolist()
    searched = np.zeros(graph.num_blocks, dtype=np.bool_)
    searched[list(graph.searched)] = True
    (implied,) = bits_of(~searched[None])
    spent = [graph.priced(row, convention)[1] for row in rows]
    left = budget - sum(spent)
    calls, blocks = np.nonzero(~gates.keep & searched)
    ranked = zip((-scores[calls, blocks]).tolist(), (-blocks).tolist(), calls.tolist(), strict=True)
    queue = list(ranked)
    heapq.heapify(queue)
    waiting: dict[int, list[tuple[float, int, int]]] = {}
    while queue:
        entry = heapq.heappop(queue)
        n, t = -entry[1], entry[2]
        row, macs, extra = 0, 0, costs[n]  # no gate costs less than its own block
        if extra <= left:
            row, macs = graph.priced(rows[t] | implied | 1 << n, convention)
            extra = macs - spent[t]
        if not row >> n & 1 or extra > left:
            waiting.setdefault(t, []).append(entry)
            continue
        rows[t], spent[t], left = row, macs, left - extra
        for retry in waiting.pop(t, []):
            heapq.heappush(queue, retry)
    return GateTable(np.stack([row_of(row, graph.num_blocks) for row in rows]))


def _paper(scores: Scores, graph: BlockGraph, target: float, convention: Convention) -> GateTable:
    """Bisect a threshold in [0, 1] until the ratio is within the tolerance (paper, section 3)."""
    low, high = 0.0, 1.0
    under, over = 0.0, 1.0
    for _ in range(60):  # beyond float64's resolution of [0, 1]
        threshold = (low + high) / 2
        gates = _at_threshold(scores, threshold, graph)
        ratio = graph.pruned_ratio(gates, convention)
        if abs(ratio - target) < PAPER_TOLERANCE:
            return gates
        if ratio < target:
            low, under = threshold, ratio
        else:
            high, over = threshold, ratio
    raise TargetError(
        f"no threshold comes within {PAPER_TOLERANCE} of target {target}: the scores jump from a "
        f"pruned ratio of {under:.4f} to {over:.4f}. Reachable next to it: {under:.4f} and "
        f"{over:.4f}; or use postprocess: budget, which fills the gap"
    )


def _released(
    scores: Scores, graph: BlockGraph, target: float, convention: Convention
) -> GateTable:
    """Remove gates under a falling threshold on p_reuse while the target is not passed.

    Differs from the released code: closures are exact (METHOD section 1), and a removal that
    would pass the target is left out instead of ending one removal short at an arbitrary block.
    """
    keep = np.ones(scores.shape, dtype=np.bool_)
    spent = [graph.row_macs(row, convention) for row in keep]
    surplus = sum(spent) - budget_macs(graph, target, len(scores), convention)
    for threshold in RELEASED_THRESHOLDS:
        for n, t in _removals(1 - scores, threshold, graph):
            if not keep[t, n] or surplus <= 0:
                continue
            row = keep[t].copy()
            row[n] = False
            row = graph.live(row)
            saved = spent[t] - graph.row_macs(row, convention)
            if saved <= surplus:
                keep[t], spent[t], surplus = row, spent[t] - saved, surplus - saved
    return graph.close(GateTable(keep))


def _removals(reuse: Scores, threshold: float, graph: BlockGraph) -> list[tuple[int, int]]:
    """List (block, call) above the threshold: blocks last to first, calls by falling p_reuse."""
    return [
        (n, int(t))
        for n in sorted(graph.searched, reverse=True)
        for t in np.argsort(-reuse[:, n], kind="stable")
        if reuse[t, n] > threshold
    ]


METHODS: dict[Postprocess, Callable[[Scores, BlockGraph, float, Convention], GateTable]] = {
    "budget": _budget,
    "paper": _paper,
    "released": _released,
}
