"""SearchOutcome: JSON both ways, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from dipgo_core.errors import SearchError
from dipgo_core.outcome import SearchOutcome


def test_outcome_scores_survive_json():
    outcome = SearchOutcome(scores=np.random.default_rng(0).random((3, 4)), forwards=7)
    again = SearchOutcome.from_json(json.loads(json.dumps(outcome.to_json())))
    assert np.array_equal(again.scores, outcome.scores) and again.forwards == 7


def test_outcome_step_masks_survive_json():
    outcome = SearchOutcome(step_masks={1: (0,), 2: (0, 3)})
    assert SearchOutcome.from_json(json.loads(json.dumps(outcome.to_json()))).step_masks == {
        1: (0,),
        2: (0, 3),
    }


def test_outcome_tables_survive_json():
    outcome = SearchOutcome(tables={0.5: ("11", "00")}, sample_forwards=2.5)
    again = SearchOutcome.from_json(json.loads(json.dumps(outcome.to_json())))
    assert again.tables == {0.5: ("11", "00")} and again.sample_forwards == 2.5


def test_outcome_refuses_nothing_and_nan():
    with pytest.raises(SearchError, match="one of scores, step_masks and tables"):
        SearchOutcome()
    with pytest.raises(SearchError, match="finite"):
        SearchOutcome(scores=np.array([[1.0, np.nan]]))


def test_selection_loads_without_torch():
    code = "import sys, dipgo_core.baselines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
