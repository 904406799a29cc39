"""A whole sweep whose store is on S3. Oracle: the same sweep run again."""

from __future__ import annotations

from orchestrator.store import open_store
from tests.orchestrator.tiny_sweep import run, tiny_sweep


def test_run_sweep_on_s3_computes_everything_once(s3_url: str) -> None:
    first, _ = run(tiny_sweep(), open_store(s3_url))
    again, _ = run(tiny_sweep(), open_store(s3_url))
    assert first.plan.complete
    assert again.plan.complete
    assert again.done == ()
    assert set(again.cached) <= set(first.done)
