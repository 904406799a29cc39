"""docs/sweep-file.md tells the truth. Oracle: the readers themselves."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from dipgo_core.config import LossSettings, SamplerSettings, SearchSettings
from dipgo_core.families import FAMILIES, NOISE_SCHEDULERS
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_file.evaluate import BASELINES, METRICS
from orchestrator.sweep_file.search import POSTPROCESS, SEARCH_STRATEGIES
from orchestrator.sweep_settings import (
    Budget,
    Calibration,
    EvaluateSettings,
    LatencySettings,
    Resources,
    SweepFile,
)

PAGE = (Path(__file__).parents[2] / "docs" / "sweep-file.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
SETTINGS = (
    [SweepFile, SamplerSettings, SearchSettings, LossSettings]
    + [EvaluateSettings, Calibration, LatencySettings, Resources, Budget]
)  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_example_of_the_page_loads(block: str, tmp_path: Path) -> None:
    path = tmp_path / "example.yaml"
    path.write_text(block, encoding="utf-8")
    assert load_sweep(path).models


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: settings.__name__)
def test_every_field_is_on_the_page(settings: type) -> None:
    words = set(re.findall(r"[a-z_]+", PAGE))
    assert {field.name for field in fields(settings)} - words == set()


@pytest.mark.parametrize(
    "names", [BASELINES, METRICS, POSTPROCESS, SEARCH_STRATEGIES, FAMILIES, NOISE_SCHEDULERS]
)
def test_every_name_is_on_the_page(names: list[str]) -> None:
    words = set(re.findall(r"[\w+]+", PAGE))
    assert set(names) - words == set()


def test_defaults_of_the_search_are_those_on_the_page() -> None:
    rows = dict(re.findall(r"^\| `([a-z_.]+)` \|.*\| ([^|]+) \|$", PAGE, re.MULTILINE))
    assert float(rows["loss.alpha"]) == LossSettings().alpha
    assert float(rows["loss.tau"]) == LossSettings().tau
    assert int(rows["steps"]) == SearchSettings().steps


def test_page_has_examples() -> None:
    assert len(BLOCKS) >= 2
