"""The engine benchmark: its ideal, its counts, its page, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("made_up", "planning", "forwards", "utilisation", "engine")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER / "engine")
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("engine")
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")
def test_ideal_is_what_is_left_when_nothing_costs(benchmark: ModuleType) -> None:
    """Oracles by hand: one search and its two chains; 5 x 8 + 2 tasks on 8 slots."""
    ideal = import_module("utilisation").ideal_makespan
    assert ideal(1, 2.0, 8) == 6.0
    assert ideal(8, 2.0, 8) == 12.0
    assert ideal(2, 1.0, 1) == 12.0


@pytest.mark.filterwarnings("ignore")
def test_page_says_what_missed_its_goal(benchmark: ModuleType) -> None:
    used = {"tasks": 82, "seconds": 30.0, "share": 0.9, "makespan": 1, "wall": 400, "ideal": 1}
    page = benchmark.page({"long": {"machine": {"cpu": "c"}, **used}})
    assert "| use of 8 slots by 82 tasks of 30 s | 90 % | ≥ 95 % | missed |" in page


@pytest.mark.slow
def test_planning_runs_small(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / "engine.py"), "--small", "--only", "planning"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)["planning"]
    assert found["again"]["cached"] == found["again"]["tasks"]
    assert found["run"]["failed"] == 0
