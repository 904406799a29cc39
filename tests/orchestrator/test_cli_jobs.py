"""What `submit` sends and says of tracking, without a cluster."""

from __future__ import annotations

import pytest

from orchestrator.cli.jobs import tracking_override, tracking_remark


def test_tracking_server_of_this_machine_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    sent = tracking_override(None)
    assert sent == ["tracking.uri=http://tracker:5000"]
    assert tracking_remark(None, sent) is None


@pytest.mark.parametrize("uri", [None, "sqlite:///mlflow.db"])
def test_tracking_into_the_folder_of_a_job_is_told(
    uri: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    sent = tracking_override(uri)
    assert "Ray deletes" in str(tracking_remark(uri, sent))
    assert tracking_remark("https://tracker", []) is None
