"""One race: who of a model's points goes on, decided from the stored scores and features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dipgo_core.errors import StoreError, TaskError
from dipgo_core.evaluation.intervals import Replicates
from orchestrator.gains import Comparisons
from orchestrator.racing import Candidate, Measured, decide
from orchestrator.records import Record
from orchestrator.task.work import Outcome, Work


def run_race(work: Work) -> Outcome:
    """Decide which candidates go on; no image is made.

    Raises:
        TaskError: a metric that was measured cannot be resampled, so nothing can be decided by it.
    """
    inputs = work.task.inputs
    candidates = [
        Candidate(**{**each, "bars": tuple(each["bars"])}) for each in inputs["candidates"]
    ]
    records = _records(work, candidates)
    comparisons = Comparisons(work.store, records)
    measured: Measured = {
        metric: _replicates(work, comparisons, records, metric) for metric in inputs["metrics"]
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


def _replicates(
    work: Work, comparisons: Comparisons, records: Mapping[str, Record], metric: str
) -> dict[str, Replicates]:
    """Return the replicates of all candidates that have the metric (the dense run may not)."""
    known: dict[str, Replicates] = {}
    for key, record in records.items():
        found = comparisons.replicates(metric, key, by_prompt=False)
        if found is not None:
            known[key] = found
        elif metric in record.outputs["metrics"]:
            raise TaskError(
                f"{work.task.label}: {metric} of the evaluation {key[:12]} cannot be resampled "
                f"({comparisons.why_unknown(metric)}), so nobody can be dropped by it. Mend that "
                f"and run the sweep again, or give evaluate.race without {metric}"
            )
    return known


def _records(work: Work, candidates: list[Candidate]) -> dict[str, Record]:
    records = {each.key: work.store.get_record(each.key) for each in candidates}
    missing = [key[:12] for key, record in records.items() if record is None]
    if missing:
        raise StoreError(
            f"{work.task.label}: the evaluations {', '.join(missing)} are gone from "
            f"{work.store.url}; run the sweep again"
        )
    return {key: record for key, record in records.items() if record is not None}
