"""Binding: what ties a SubNet to the pipeline it was made for."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any, cast

import diffusers
from torch import nn

from dipgo_core.config import Convention, SamplerSettings
from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.pipelines import LoadedModel, tokens_of
from dipgo_core.sampling import noise_scheduler, timesteps_of
from dipgo_core.subnet import SubNet, config_sha256


def deciding_config(configured: Any) -> dict[str, Any]:
    """Return the config fields that decide the output: arguments of the class, as JSON values.

    JSON has no infinity: a default of infinity (bounds that bound nothing) is left out.
    """
    accepted = inspect.signature(type(configured).__init__).parameters
    config = {
        name: value
        for name, value in configured.config.items()
        if name in accepted and name[0] != "_" and not _unbounded(value, accepted[name].default)
    }
    return cast(dict[str, Any], json.loads(json.dumps(config, sort_keys=True, default=list)))


def _unbounded(value: Any, default: Any) -> bool:
    return isinstance(value, float) and math.isinf(value) and value == default


def subnet_of(
    model: LoadedModel,
    graph: BlockGraph,
    sampler: SamplerSettings,
    gates: GateTable,
    **provenance: Any,
) -> SubNet:
    """Return the SubNet that runs `gates` (closed) on this model and sampler."""
    return subnet_from(
        graph, gates, model_facts(model), sampler_facts(model, sampler), **provenance
    )


def subnet_from(
    graph: BlockGraph,
    gates: GateTable,
    model: Mapping[str, Any],
    sampler: Mapping[str, Any],
    **provenance: Any,
) -> SubNet:
    """Return the SubNet that runs `gates` (closed) on a model that need not be loaded.

    model, sampler: as `model_facts` and `sampler_facts` tell them.
    """
    closed = graph.close(gates)
    conventions: tuple[Convention, ...] = ("all", "paper")
    macs = {name: _macs(graph, closed, name, sampler.get("guidance_calls")) for name in conventions}
    return SubNet(
        gates=closed,
        block_names=graph.names,
        reuse=tuple(block.reuse for block in graph.blocks),
        granularity=graph.granularity,
        model=model,
        sampler=sampler,
        macs={**macs["all"], "convention": "all", "paper": macs["paper"]},
        provenance=provenance,
    )


def _macs(
    graph: BlockGraph, closed: GateTable, convention: Convention, guided: int | None
) -> dict[str, Any]:
    dense = graph.call_macs(convention) * closed.num_calls
    kept = graph.macs(closed, convention, guided)
    return {"dense": dense, "kept": kept, "pruned_ratio": 1 - kept / dense}


def model_facts(model: LoadedModel) -> dict[str, Any]:
    """Return what a SubNet says of its model: where it is from, its denoiser's config, sizes."""
    config = deciding_config(model.denoiser)
    return {
        "family": model.family.name,
        "id": model.settings.id,
        "revision": model.settings.revision,
        "base": model.settings.base,
        "resolution": model.settings.resolution,
        "denoiser": type(model.denoiser).__name__,
        "config": config,
        "config_sha256": config_sha256(config),
        "latent_side": model.latent_side,
        "tokens": tokens_of(model.pipe, model.family, model.settings.id),
    }


def sampler_facts(model: LoadedModel, sampler: SamplerSettings) -> dict[str, Any]:
    """Return what a SubNet says of its sampler: the noise scheduler's config and timesteps."""
    scheduler = noise_scheduler(model, sampler)
    config = deciding_config(scheduler)
    calls = sampler.guidance_calls
    return {
        "scheduler": type(scheduler).__name__,
        "config": config,
        "config_sha256": config_sha256(config),
        "steps": sampler.steps,
        "custom": sampler.custom,
        "timesteps": timesteps_of(scheduler),
        "guidance_scale": sampler.guidance_scale,
        **({} if calls is None else {"guidance_calls": calls}),
    }


def scheduler_of(subnet: SubNet) -> Any:
    """Return the noise scheduler that the SubNet was made for.

    Raises:
        SubNetError: this diffusers has none of its name.
    """
    name = str(subnet.sampler["scheduler"])
    found = getattr(diffusers, name, None) if name.endswith("Scheduler") else None
    if found is None:
        raise SubNetError(
            f"the SubNet was made for the noise scheduler {name!r}, which diffusers "
            f"{diffusers.__version__} does not have; install the version that made it"
        )
    return found.from_config(dict(subnet.sampler["config"]))


# what a pipeline must be ------------------------------------------------------------------------


def check_model(pipe: Any, denoiser: Any, subnet: SubNet) -> None:
    """Raise SubNetMismatchError unless the pipeline's denoiser is the one the SubNet is for."""
    expected = subnet.model["denoiser"]
    if type(denoiser).__name__ != expected:
        found = "none" if denoiser is None else type(denoiser).__name__
        raise SubNetMismatchError(
            f"the SubNet was made for {expected} of {subnet.model['id']}, but this "
            f"{type(pipe).__name__} has {found}; load {subnet.model['id']!r}"
        )
    differing = _differences(subnet.model["config"], denoiser)
    if differing and denoiser.config.get("encoder_hid_dim_type") == "ip_image_proj":
        raise SubNetMismatchError(
            f"this {type(pipe).__name__} has an IP-Adapter: {expected} asks for its images, and "
            "there are none while its blocks are found. This works: pipe.unload_ip_adapter(), then "
            "apply_subnet(pipe, subnet), then pipe.load_ip_adapter(...) again"
        )
    if differing:
        raise SubNetMismatchError(
            f"the SubNet was made for {subnet.model['id']}, whose {expected} has another config "
            f"(SubNet / this pipeline): {differing}; load {subnet.model['id']!r}"
        )


def check_offloading(denoiser: nn.Module, attribute: str) -> None:
    """Raise SubNetError where weights are fetched ahead, in the order in which all blocks run."""
    for module in denoiser.modules():
        registry = vars(module).get("_diffusers_hook")
        hook = None if registry is None else registry.get_hook("group_offloading")
        if getattr(getattr(hook, "group", None), "stream", None) is not None:
            raise SubNetError(
                f"pipe.{attribute} has group offloading with streams: each block fetches the next "
                "one's weights, so a block after a reused one would find none. This works, on a "
                f"pipeline loaded anew: pipe.{attribute}.enable_group_offload(..., "
                "use_stream=False), or pipe.enable_model_cpu_offload()"
            )


def check_scheduler(scheduler: Any, subnet: SubNet) -> None:
    """Raise SubNetMismatchError unless the noise scheduler is the SubNet's, in class and config."""
    expected, found = subnet.sampler["scheduler"], type(scheduler).__name__
    differing = _differences(subnet.sampler["config"], scheduler)
    if expected == found and not differing:
        return
    what = f"config differs (SubNet / this pipeline): {differing}" if expected == found else found
    raise SubNetMismatchError(
        f"the SubNet was made for the noise scheduler {expected}, this pipeline's {what}. "
        f"This works: pipe.scheduler = diffusers.{expected}.from_config("
        'subnet.sampler["config"])'
    )


def check_blocks(graph: BlockGraph, subnet: SubNet) -> None:
    """Raise SubNetMismatchError unless the denoiser's blocks are the SubNet's."""
    expected = list(zip(subnet.block_names, subnet.reuse, strict=True))
    found = [(block.name, block.reuse) for block in graph.blocks]
    if expected != found:
        missing = sorted({name for name, _ in expected} - set(graph.names))
        extra = sorted(set(graph.names) - {name for name, _ in expected})
        raise SubNetMismatchError(
            f"the SubNet's blocks are not those of this {graph.denoiser}: missing here "
            f"{missing or 'none'}, not in the SubNet {extra or 'none'}, or in another order or "
            "kind of reuse; export the SubNet again with this version"
        )


def check_timesteps(scheduler: Any, subnet: SubNet) -> None:
    """Raise SubNetMismatchError unless a run's timesteps are the SubNet's.

    Where they depend on the images' size (dynamic shifting), only their number is compared.
    """
    found, expected = timesteps_of(scheduler), list(subnet.sampler["timesteps"])
    shifting = scheduler.config.get("use_dynamic_shifting", False)
    if found == expected or (shifting and len(found) == len(expected)):
        return
    arguments = ", ".join(f"{name}={value}" for name, value in subnet.call_kwargs().items())
    raise SubNetMismatchError(
        f"the SubNet has {len(expected)} calls at timesteps {_shortened(expected)}, this run "
        f"has {len(found)} at {_shortened(found)}. This works: pipe(..., **subnet.call_kwargs()), "
        f"that is pipe(..., {arguments}); subnet.resample(steps) makes a SubNet of other steps"
    )


def _differences(expected: Mapping[str, Any], configured: Any) -> str:
    """Return "field: theirs / ours" for every field that differs; absent fields have defaults."""
    parameters = inspect.signature(type(configured).__init__).parameters
    found = deciding_config(configured)

    def value(config: Mapping[str, Any], name: str) -> Any:
        default = parameters[name].default if name in parameters else "absent"
        given = config.get(name, default)
        return list(given) if isinstance(given, tuple) else given

    pairs = {name: (value(expected, name), value(found, name)) for name in {*expected, *found}}
    return ", ".join(f"{n}: {a!r} / {b!r}" for n, (a, b) in sorted(pairs.items()) if a != b)


def _shortened(timesteps: list[float]) -> str:
    shown = [f"{t:g}" for t in timesteps]
    return ", ".join(shown if len(shown) < 6 else [*shown[:3], "...", shown[-1]])
