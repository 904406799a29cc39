"""What the search behind a point has cost, and what it began with, from their records. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from orchestrator.records import Record

#: Keys in a search's inputs: tasks whose results it began with.
BEGUN_WITH = ("errors", "step_masks")
#: What is told of a search itself wherever points are listed.
SPENT = ("forwards", "sample_forwards", "seconds")


@dataclass(frozen=True, kw_only=True)
class SearchCost:
    """What one search has spent; None = its record does not say.

    forwards: denoiser calls, a batch is one. sample_forwards: of one image, in whole calls.
    peak_memory_bytes: of the process, or of what its GPU held.
    begun_with: what the tasks have spent that it took results from; searches share those.
    """

    forwards: int | None
    sample_forwards: float | None
    seconds: float | None
    peak_memory_bytes: int | None = None
    begun_with: Mapping[str, SearchCost] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Format as ``2,500 forwards, 110 s (+ errors: 90 forwards, 5 s)``."""
        shared = ", ".join(
            f"{name.replace('_', ' ')}: {one.text}" for name, one in self.begun_with.items()
        )
        parts = [_counted(self), "" if self.seconds is None else f"{self.seconds:,.0f} s"]
        own = ", ".join(filter(None, parts))
        return f"{own} (+ {shared})" if shared else own


def search_cost(record: Record | None, records: Mapping[str, Record]) -> SearchCost | None:
    """Return what a finished search has spent; None where there is none."""
    if record is None:
        return None
    keys = {name: str(record.inputs.get(name)) for name in BEGUN_WITH}
    found = {name: records[key] for name, key in keys.items() if key in records}
    outputs = record.outputs
    return SearchCost(
        forwards=outputs.get("forwards"),
        sample_forwards=outputs.get("sample_forwards"),
        seconds=outputs.get("seconds"),
        peak_memory_bytes=outputs.get("peak_memory_bytes"),
        begun_with={
            name: cost
            for name, one in found.items()
            if (cost := search_cost(one, records)) is not None
        },
    )


def _counted(cost: SearchCost) -> str:
    if cost.sample_forwards is not None:
        return f"{cost.sample_forwards:,.0f} forwards"
    return "" if cost.forwards is None else f"{cost.forwards:,} batches"
