"""Settings of every test: offline, few threads, nothing taken from the user's environment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Read by libraries when they are imported, hence here and not in a fixture.
os.environ.update(
    {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MPLBACKEND": "Agg",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
)
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
for variable in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", "COCO_PROMPTS"):
    os.environ.pop(variable, None)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).parents[1]
