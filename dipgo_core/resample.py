"""Resampling: the rows of a SubNet on another number of steps, without loading the model.

The denoiser is rebuilt from its config on the meta device, which gives blocks and MACs; the noise
scheduler from its own config, which gives the timesteps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import diffusers
import numpy as np
import numpy.typing as npt
import torch

from dipgo_core.binding import scheduler_of
from dipgo_core.blocks import trace_denoiser
from dipgo_core.config import Convention, SamplerSettings
from dipgo_core.errors import DipgoError, SubNetError
from dipgo_core.families import find_family, find_known, num_calls, short_name
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.sampling import timesteps_of
from dipgo_core.subnet import SubNet

Keep = npt.NDArray[np.bool_]
_SLACK = 1e-9  # of the MACs of one call


def resampled(subnet: SubNet, steps: int) -> SubNet:
    """Return `subnet` with another number of steps.

    Each new call takes a row that the old run has at the same place: of those, the one that keeps
    closest to what the old run has computed by then. So no more is pruned than before.

    Raises:
        SubNetError: the noise scheduler cannot do so many steps, or follows a list of its own; the
            model's class is unknown here, or its blocks are found by running it alone.
    """
    if subnet.sampler.get("custom"):
        raise SubNetError(
            "this SubNet follows a list of its own, which has no other number of steps; search "
            "with the list you want, or with a noise scheduler's spacing"
        )
    graph = _graph_of(subnet)
    timesteps = _timesteps_at(subnet, steps)
    gates = _resampled_gates(graph, subnet.gates, len(timesteps))
    came_from = {
        "steps": subnet.sampler["steps"],
        "calls": subnet.gates.num_calls,
        "keep_sha256": subnet.gates.digest,
        "pruned_ratio": subnet.macs["pruned_ratio"],
    }
    return replace(
        subnet,
        gates=gates,
        sampler={**subnet.sampler, "steps": steps, "timesteps": timesteps},
        macs=_macs(subnet, graph, gates),
        provenance={**subnet.provenance, "resampled_from": came_from},
        metrics={},
    )


def _graph_of(subnet: SubNet) -> BlockGraph:
    """Trace the denoiser that the SubNet's config describes."""
    name, known = subnet.model["denoiser"], find_known(subnet.model["id"])
    family = find_family(subnet.model["family"])
    cls = getattr(diffusers, name, None)
    if cls is None:
        raise SubNetError(f"diffusers {diffusers.__version__} has no {name}; install one that does")
    try:
        with torch.device("meta"):
            denoiser = cls.from_config(dict(subnet.model["config"]))
        graph = trace_denoiser(
            denoiser,
            family,
            tokens=int(subnet.model.get("tokens", known.tokens if known else 77)),
            side=subnet.model.get("latent_side"),
            granularity=subnet.granularity,
        )
    except (DipgoError, TypeError, ValueError, RuntimeError) as error:
        raise SubNetError(
            f"the blocks of {name} cannot be found from the SubNet's config alone: {error}"
        ) from error
    if graph.names != subnet.block_names:
        raise SubNetError(
            f"the SubNet's blocks are not those of {name} as this version finds them; export the "
            "SubNet again, then resample it"
        )
    return graph


def _timesteps_at(subnet: SubNet, steps: int) -> list[float]:
    """Return the timesteps of a run of so many steps: class and config of the scheduler suffice."""
    scheduler = scheduler_of(subnet)
    family = find_family(subnet.model["family"])
    name = short_name(type(scheduler).__name__) or ""
    try:
        sampler = SamplerSettings(scheduler=name, steps=steps, guidance_scale=1.0)
        side = subnet.model.get("latent_side") or family.latent_side(subnet.model["config"])
        scheduler.set_timesteps(**family.schedule(scheduler.config, side, sampler))
    except (DipgoError, TypeError, ValueError, IndexError) as error:
        raise SubNetError(
            f"{type(scheduler).__name__} cannot do {steps} steps: {error}; choose another number"
        ) from error
    timesteps = timesteps_of(scheduler)
    if name and len(timesteps) != num_calls(name, steps):
        raise SubNetError(
            f"{type(scheduler).__name__} rounds {steps} steps to {len(timesteps)} timesteps; take "
            "one step more or less"
        )
    return timesteps


def _resampled_gates(graph: BlockGraph, gates: GateTable, num_calls: int) -> GateTable:
    """Return rows of `gates`, one a new call, that never prune more than all of them do."""
    old = gates.num_calls
    costs = np.array([graph.row_macs(row) for row in gates.keep]) / graph.call_macs()
    spent_by = np.concatenate([[0.0], np.cumsum(costs)]) / old  # share of the run, by old call
    chosen, spent = list[int](), 0.0
    for call in range(num_calls):
        goal = float(np.interp((call + 1) / num_calls, np.arange(old + 1) / old, spent_by))
        row = _nearest(costs, _overlapping(call, num_calls, old), goal * num_calls - spent)
        chosen.append(row)
        spent += float(costs[row])
    keep = gates.keep[chosen]
    given = _given_back(keep, costs[chosen], float(costs.mean()))
    return graph.close(GateTable(given, gates.extrapolation))


def _overlapping(call: int, num_calls: int, old: int) -> Sequence[int]:
    """Return the old calls that share time with a new one, the nearest in the run first.

    The first call of all is whole, and so is taken for the first one alone.
    """
    if call == 0:
        return [0]
    first, last = call * old // num_calls, -(-(call + 1) * old // num_calls)
    middle = (call + 0.5) * old / num_calls - 0.5
    return sorted(range(max(first, 1), max(last, 2)), key=lambda row: abs(row - middle))


def _nearest(costs: npt.NDArray[np.float64], rows: Sequence[int], owed: float) -> int:
    """Return the row whose cost comes closest to what is owed by now; the first of equal ones."""
    return min(rows, key=lambda row: round(abs(float(costs[row]) - owed), 9))


def _given_back(keep: Keep, costs: npt.NDArray[np.float64], least: float) -> Keep:
    """Compute calls whole, the ones nearest to whole first, until enough is spent."""
    keep, costs = keep.copy(), costs.copy()
    for call in np.argsort(-costs, kind="stable"):
        if costs.mean() >= least - _SLACK:
            break
        keep[call], costs[call] = True, 1.0
    return keep


def _macs(subnet: SubNet, graph: BlockGraph, gates: GateTable) -> dict[str, Any]:
    """Return the MACs of the new run, at the size that the old ones were counted at."""

    def counted(before: Mapping[str, Any], convention: Convention) -> dict[str, Any]:
        ratio = graph.pruned_ratio(gates, convention)
        dense = int(before["dense"]) * gates.num_calls // subnet.gates.num_calls
        return {"dense": dense, "kept": round(dense * (1 - ratio)), "pruned_ratio": ratio}

    convention = cast(Convention, subnet.macs["convention"])
    macs = {**counted(subnet.macs, convention), "convention": convention}
    if "paper" in subnet.macs:
        macs["paper"] = counted(subnet.macs["paper"], "paper")
    return macs
