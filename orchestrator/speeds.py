"""What latency records say of a point: speed, its denoising loop, throughput, memory, energy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from orchestrator.records import Record

#: Figures of a record that a point carries with the ends of their intervals.
TIMES = ("latency_ms", "speedup", "loop_ms", "loop_speedup")

#: What latencies must share to be compared, as a record's inputs name it.
CONDITIONS = ("device", "threads", "attention", "compile", "batch_size")


def speed_of(headline: Record, others: Iterable[Record] = ()) -> dict[str, Any]:
    """Return the fields of a resolved point that latency tells.

    headline: of the batch size that speeds are compared at; others: of further batch sizes, which
    only add throughput. A disturbed measurement gives no figures, only the reason.
    """
    records = (headline, *others)
    usable = [record for record in records if is_usable(record)]
    fields = {
        "device": device_name(headline),
        "latency_usable": is_usable(headline),
        "latency_note": _note(records),
        "throughput": _throughput(usable, "images_per_second"),
        "dense_throughput": _throughput(usable, "dense_images_per_second"),
    }
    return {**fields, **_figures(headline.outputs)} if is_usable(headline) else fields


def is_usable(record: Record) -> bool:
    """Whether nothing disturbed the measurement."""
    return bool(record.outputs.get("usable", True))


def device_name(record: Record) -> str:
    """Return what a latency was measured on, as fronts are grouped by it."""
    return str(record.inputs["device"])


def latency_conditions(record: Record) -> dict[str, Any]:
    """Return what a latency was measured under; latencies of other conditions are not compared."""
    known = {name: record.inputs[name] for name in CONDITIONS if name in record.inputs}
    return {**known, "dtype": record.inputs["model"]["dtype"]}


def _figures(outputs: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"latency_ms_p95": outputs["latency_ms"].get("p95")}
    for name in TIMES:
        figure = outputs.get(name) or {}
        ends = {name: "value", f"{name}_low": "low", f"{name}_high": "high"}
        fields |= {field: figure.get(end) for field, end in ends.items()}
    peak = outputs.get("memory", {}).get("pruned", {})
    held = peak.get("allocated") or peak.get("resident")
    return {
        **fields,
        "dense_latency_ms": outputs.get("dense_latency_ms", {}).get("value"),
        "peak_memory_mb": None if held is None else held / 2**20,
        "energy_j": outputs.get("energy", {}).get("pruned_j"),
    }


def _throughput(records: Iterable[Record], name: str) -> dict[str, dict[str, float | None]]:
    """Return images per second with their interval, by batch size."""
    return {
        str(record.inputs["batch_size"]): {end: figure[end] for end in ("value", "low", "high")}
        for record in records
        if (figure := record.outputs.get(name)) is not None
    }


def _note(records: Iterable[Record]) -> str | None:
    """Return what a reader of the figures must know: what disturbed them, how they were taken."""
    notes = []
    for record in records:
        outputs = record.outputs
        said = [outputs.get("disturbed"), _unsettled(outputs), *outputs.get("unchecked", ())]
        notes += [f"batch {record.inputs['batch_size']}: {each}" for each in said if each]
    return "; ".join(notes) or None


def _unsettled(outputs: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the warm-up: times that still changed when it ended."""
    warmup = outputs.get("warmup", {})
    if warmup.get("stable") is not False:
        return None
    return f"times had not settled after {warmup['pairs']} pairs of warm-up"
