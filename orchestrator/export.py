"""export_subnet: a finished point as the SubNet file a user deploys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipgo_core.errors import StoreError
from dipgo_core.subnet import SubNet
from orchestrator.metrics import QUALITIES
from orchestrator.points import ResolvedPoint
from orchestrator.records import Record
from orchestrator.sweep_settings import SweepFile


def export_subnet(point: ResolvedPoint, records: Mapping[str, Record], sweep: SweepFile) -> SubNet:
    """Return the SubNet that was evaluated, with where it comes from and what was measured.

    Raises:
        StoreError: the point is not evaluated yet.
    """
    record = records.get(point.evaluate_key or "")
    if record is None:
        raise StoreError(
            f"point {point.key[:12]} ({point.name}) is not evaluated yet "
            f"({point.error or point.state}): run the sweep, then export again"
        )
    document = dict(record.outputs["subnet"])
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
        "protocol": point.protocol,
        "versions": {**record.inputs.get("versions", {}), **record.versions},
    }
    document["metrics"] = _metrics(point)
    return SubNet.from_json(document, source=f"record {record.key[:12]}")


def _search_settings(point: ResolvedPoint, records: Mapping[str, Record]) -> dict[str, Any] | None:
    found = (records.get(key) for key in point.task_keys)
    searches = [record for record in found if record is not None and record.kind == "search"]
    return dict(searches[0].inputs["search"]) if searches else None


def _metrics(point: ResolvedPoint) -> dict[str, Any]:
    """Return every known figure with its interval, its n and its gain."""
    names = (*QUALITIES, "latency_ms", "speedup")
    ends = {f"{name}{end}" for name in names for end in ("", "_low", "_high")}
    figures = {name: getattr(point, name) for name in sorted(ends)}
    gains = {metric: vars(gain) for metric, gain in point.gain.items()}
    known = {name: value for name, value in figures.items() if value is not None}
    return {
        **known,
        "macs_speedup": point.macs_speedup,
        "n_images": point.n_images,
        "device": point.device,
        "scorers": dict(point.scorers),
        "gain": gains,
        "verdict": point.verdict,
    }
