"""`models`: the known families and models, from literal facts alone."""

from __future__ import annotations

from typing import Any

from dipgo_core.families import FAMILIES, KNOWN_MODELS, NOISE_SCHEDULERS, Family, KnownModel
from orchestrator.cli.show import print_table

GIGA = 1e9


def models_json() -> dict[str, Any]:
    """Return every family with its models, and the noise schedulers a sweep file may name."""
    return {
        "families": [family_json(family) for family in FAMILIES.values()],
        "noise_schedulers": {name: known.cls for name, known in NOISE_SCHEDULERS.items()},
    }


def family_json(family: Family) -> dict[str, Any]:
    models = [known for known in KNOWN_MODELS if known.family == family.name]
    return {
        "family": family.name,
        "pipeline": family.pipeline,
        "denoiser": family.denoiser,
        "conditioning": family.conditioning,
        "reuse": str(family.reuse),
        "models": [model_json(known) for known in models],
    }


def model_json(known: KnownModel) -> dict[str, Any]:
    """Facts of one model; MACs are of one batch-1 denoiser forward in both conventions."""
    return {
        "id": known.id,
        "bundled": known.bundled,
        "resolution": known.resolution,
        "blocks": known.num_blocks,
        "macs": {"all": known.macs, "paper": known.macs_paper},
        "prediction_type": known.prediction_type,
        "sampler": known.sampler.to_json(),
        "note": known.note,
    }


def print_models() -> None:
    """Print one row a known model."""
    rows = [
        (
            known.id,
            known.family,
            FAMILIES[known.family].denoiser,
            f"{known.resolution}",
            f"{known.num_blocks}",
            f"{known.macs / GIGA:.4g}",
            f"{known.macs_paper / GIGA:.4g}",
            "in the package" if known.bundled else known.note,
        )
        for known in KNOWN_MODELS
    ]
    columns = (
        "id", "family", "denoiser", "pixels", "gates a call", "GMACs (all)", "GMACs (paper)", "note"
    )  # fmt: skip
    print_table(
        "Known models; MACs of one denoiser forward, batch 1", columns, rows, right=columns[3:7]
    )
