"""export_subnet: a finished point as the SubNet file a user deploys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipgo_core.errors import StoreError
from dipgo_core.subnet import SubNet
from orchestrator.metrics import IMAGE_FIGURES
from orchestrator.points import ResolvedPoint
from orchestrator.records import Record
from orchestrator.speeds import TIMES, latency_conditions
from orchestrator.sweep_settings import SweepFile


def export_subnet(point: ResolvedPoint, records: Mapping[str, Record], sweep: SweepFile) -> SubNet:
    """Return the SubNet that was evaluated, with where it comes from and what was measured.

    Raises:
        StoreError: the point is not evaluated yet, or not by gates alone.
    """
    record = records.get(point.evaluate_key or "")
    if record is None:
        raise StoreError(
            f"point {point.key[:12]} ({point.name}) is not evaluated yet "
            f"({point.error or point.state}): run the sweep, then export again"
        )
    document = dict(record.outputs["subnet"])
    if not is_subnet(record):
        raise StoreError(
            f"point {point.key[:12]} ({point.name}) leaves guidance out at its last calls, which "
            "no SubNet file can ask a pipeline for: export another point"
        )
    document["provenance"] = {
        **document.get("provenance", {}),
        "sweep": sweep.name,
        "sweep_digest": sweep.digest,
        "point": point.key,
        "method": point.method,
        "strategy": point.strategy,
        "target": point.target,
        "seed": point.seed,
        "search": _search_settings(point, records),
        "evaluate_key": record.key,
        "protocol": point.measured_under,
        "protocol_fields": record.inputs["protocol"],
        "weights_sha256": record.inputs["model"]["weights_sha256"],
        "latency": _latency_conditions(point, records),
        "versions": {**record.inputs.get("versions", {}), **record.versions},
    }
    document["metrics"] = _metrics(point)
    return SubNet.from_json(document, source=f"record {record.key[:12]}")


def is_subnet(record: Record) -> bool:
    """Return whether gates alone make what was evaluated, of the model's own pipeline call."""
    return "guidance_calls" not in record.outputs["subnet"]["sampler"]


def _search_settings(point: ResolvedPoint, records: Mapping[str, Record]) -> dict[str, Any] | None:
    found = (records.get(key) for key in point.task_keys)
    searches = [record for record in found if record is not None and record.kind == "search"]
    return dict(searches[0].inputs["search"]) if searches else None


def _latency_conditions(
    point: ResolvedPoint, records: Mapping[str, Record]
) -> dict[str, Any] | None:
    """Return what the latency was measured under; None where it was not."""
    record = records.get(point.latency_key or "")
    return None if record is None else latency_conditions(record)


def _metrics(point: ResolvedPoint) -> dict[str, Any]:
    """Return every known figure with its interval, its n, its scorer and its gain."""
    figures: dict[str, float | None] = {}
    for name in (*IMAGE_FIGURES, *TIMES):
        low, high = point.bounds(name)
        figures |= {name: point.value(name), f"{name}_low": low, f"{name}_high": high}
    gains = {metric: vars(gain) for metric, gain in point.gain.items()}
    known = {name: value for name, value in figures.items() if value is not None}
    return {
        "protocol": point.measured_under,
        **known,
        "macs_speedup": point.macs_speedup,
        "images_per_second": {size: dict(rate) for size, rate in point.throughput.items()},
        "peak_memory_mb": point.peak_memory_mb,
        "energy_j": point.energy_j,
        "n_images": point.n_images,
        "n": {name: figure.n for name, figure in point.figures.items()},
        "device": point.device,
        "scorers": {name: f.scorer for name, f in point.figures.items() if f.scorer},
        "gain": gains,
        "verdict": point.verdict,
    }
