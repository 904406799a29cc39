"""One race: who of a model's points goes on, decided from the stored scores and features."""

from __future__ import annotations

from typing import Any

from dipgo_core.errors import StoreError
from orchestrator.gains import Comparisons
from orchestrator.racing import Candidate, Measured, decide
from orchestrator.records import Record
from orchestrator.task.work import Outcome, Work


def run_race(work: Work) -> Outcome:
    """Decide which candidates go on; no image is made."""
    inputs = work.task.inputs
    candidates = [
        Candidate(**{**each, "bars": tuple(each["bars"])}) for each in inputs["candidates"]
    ]
    comparisons = Comparisons(work.store, _records(work, candidates))
    measured: Measured = {
        metric: {
            each.key: found
            for each in candidates
            if (found := comparisons.replicates(metric, each.key, by_prompt=False)) is not None
        }
        for metric in inputs["metrics"]
    }
    decision = decide(candidates, measured, alpha=float(inputs["alpha"]), top=int(inputs["top"]))
    dropped: dict[str, Any] = {
        key: {"images": inputs["images"], "by": dict(by)} for key, by in decision.dropped.items()
    }
    return Outcome(
        {
            "kept": list(decision.kept),
            "dropped": dropped,
            "critical": decision.critical,
            "candidates": len(candidates),
            "images": inputs["images"],
        }
    )


def _records(work: Work, candidates: list[Candidate]) -> dict[str, Record]:
    records = {each.key: work.store.get_record(each.key) for each in candidates}
    missing = [key[:12] for key, record in records.items() if record is None]
    if missing:
        raise StoreError(
            f"{work.task.label}: the evaluations {', '.join(missing)} are gone from "
            f"{work.store.url}; run the sweep again"
        )
    return {key: record for key, record in records.items() if record is not None}
