"""`models`: the known families and models, from literal facts alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dipgo_core.families import (
    FAMILIES,
    KNOWN_MODELS,
    NOISE_SCHEDULERS,
    Family,
    KnownModel,
    calls_of,
)
from dipgo_core.graph import Reuse
from orchestrator.cli.show import console, megabytes, print_table, print_wrapped, say

GIGA = 1e9
ROOMY = 120  # columns of a terminal that ids need not be broken in

_CACHE_OF = "all block outputs of one batch-1 forward in 16 bit; guidance doubles the batch"


def models_json() -> dict[str, Any]:
    """Return every family with its models, and the noise schedulers a sweep file may name."""
    return {
        "families": [family_json(family) for family in FAMILIES.values()],
        "noise_schedulers": {name: known.cls for name, known in NOISE_SCHEDULERS.items()},
        "cache_bytes_of": _CACHE_OF,
    }


def family_json(family: Family) -> dict[str, Any]:
    models = [known for known in KNOWN_MODELS if known.family == family.name]
    return {
        "family": family.name,
        "pipeline": family.pipeline,
        "pipelines": list(family.pipelines),
        "denoiser": family.denoiser,
        "conditioning": family.conditioning,
        "reuse": str(family.reuse),
        "schedulers": list(family.schedulers),
        "resolution": family.resolution,
        "sampler": family.sampler.to_json(),
        "scorers": asdict(family.scorers),
        "models": [model_json(known) for known in models],
    }


def model_json(known: KnownModel) -> dict[str, Any]:
    """Facts of one model; MACs are of one batch-1 denoiser forward in both conventions."""
    calls = calls_of(known.sampler)
    return {
        "id": known.id,
        "bundled": known.bundled,
        "resolution": known.resolution,
        "blocks": known.num_blocks,
        "layers": known.num_layers,
        "calls": calls,
        "gates": {
            "block": calls * known.num_blocks,
            "layer": calls * known.num_layers,
            "searched_block": searched_gates(known, known.num_blocks),
            "searched_layer": searched_gates(known, known.num_layers),
        },
        "macs": {"all": known.macs, "paper": known.macs_paper},
        "cache_bytes": {"block": known.cache_bytes, "layer": known.cache_bytes_layers},
        "prediction_type": known.prediction_type,
        "sampler": known.sampler.to_json(),
        "scorers": asdict(known.scorers),
        "base": known.base,
        "note": known.note,
    }


def searched_gates(known: KnownModel, gates: int) -> int:
    """Return how many gates a search decides in a run of the default sampler.

    The first call computes everything. Where reusing the last block means skipping the call (blocks
    reused by output: U-Nets), the gate of the whole denoiser is not searched. gates: of one call.
    """
    implied = FAMILIES[known.family].reuse is Reuse.OUTPUT
    return (calls_of(known.sampler) - 1) * (gates - implied)


def print_models() -> None:
    """Print each family with its models."""
    for family in FAMILIES.values():
        _print_family(family)
    say("blocks, layers: gates a call at either granularity, the denoiser itself included")
    say("gates a run: of blocks, by the default sampler; in brackets what a search decides")
    say("GMACs: one denoiser forward, batch 1, with and without attention products")
    say(f"cache: {_CACHE_OF}; for blocks, layers")
    say("`dipgo-sweep models show ID` draws the block graph of one")


def _print_family(family: Family) -> None:
    models = [known for known in KNOWN_MODELS if known.family == family.name]
    columns = (
        "model", "pixels", "blocks, layers", "calls", "gates a run",
        "GMACs (all)", "(paper)", "cache MB",
    )  # fmt: skip
    kind = f"{family.denoiser}, by {family.conditioning}, blocks reused by {family.reuse}"
    print_table(
        f"{family.name}: {kind}", columns, map(_row, models), right=columns[1:], compact=True
    )
    for known in models:
        if known.note:
            print_wrapped(known.id, known.note)
    scorers = {role: name for role, name in asdict(family.scorers).items() if name is not None}
    print_wrapped("  a SubNet runs in", ", ".join(family.pipelines))
    print_wrapped("  noise schedulers", ", ".join(family.schedulers))
    print_wrapped("  scorers", ", ".join(f"{role} {name}" for role, name in scorers.items()))
    say()


def _row(known: KnownModel) -> tuple[str, ...]:
    calls, gates = calls_of(known.sampler), known.num_blocks
    return (
        known.id if console().width >= ROOMY else known.id.replace("/", "/\n"),
        f"{known.resolution}",
        f"{gates}, {known.num_layers}",
        f"{calls}",
        f"{calls * gates} ({searched_gates(known, gates)})",
        _giga(known.macs),
        _giga(known.macs_paper),
        f"{megabytes(known.cache_bytes)}, {megabytes(known.cache_bytes_layers)}",
    )


def _giga(macs: int) -> str:
    return f"{macs / GIGA:.1f}" if macs >= GIGA else f"{macs / GIGA:.4f}"
