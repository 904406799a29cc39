"""Binding: what ties a SubNet to the pipeline it was made for."""

from __future__ import annotations

import inspect
import json
from typing import Any, cast

from dipgo_core.config import SamplerSettings
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.pipelines import LoadedModel
from dipgo_core.sampling import noise_scheduler, timesteps_of
from dipgo_core.subnet import SubNet, config_sha256


def deciding_config(configured: Any) -> dict[str, Any]:
    """Return the config fields that decide the output: arguments of the class, as JSON values."""
    accepted = inspect.signature(type(configured).__init__).parameters
    config = {k: v for k, v in configured.config.items() if k in accepted and k[0] != "_"}
    return cast(dict[str, Any], json.loads(json.dumps(config, sort_keys=True, default=list)))


def subnet_of(
    model: LoadedModel,
    graph: BlockGraph,
    sampler: SamplerSettings,
    gates: GateTable,
    **provenance: Any,
) -> SubNet:
    """Return the SubNet that runs `gates` (closed) on this model and sampler."""
    scheduler = noise_scheduler(model, sampler)
    closed = graph.close(gates)
    macs = {
        convention: {
            "dense": graph.call_macs(convention) * closed.num_calls,
            "kept": graph.macs(closed, convention),
            "pruned_ratio": graph.pruned_ratio(closed, convention),
        }
        for convention in ("all", "paper")
    }
    model_config, scheduler_config = deciding_config(model.denoiser), deciding_config(scheduler)
    return SubNet(
        gates=closed,
        block_names=graph.names,
        reuse=tuple(block.reuse for block in graph.blocks),
        granularity=graph.granularity,
        model={
            "family": model.family.name,
            "id": model.settings.id,
            "revision": model.settings.revision,
            "denoiser": type(model.denoiser).__name__,
            "config": model_config,
            "config_sha256": config_sha256(model_config),
        },
        sampler={
            "scheduler": type(scheduler).__name__,
            "config": scheduler_config,
            "config_sha256": config_sha256(scheduler_config),
            "steps": sampler.steps,
            "timesteps": timesteps_of(scheduler),
            "guidance_scale": sampler.guidance_scale,
        },
        macs={**macs["all"], "convention": "all", "paper": macs["paper"]},
        provenance=provenance,
    )
