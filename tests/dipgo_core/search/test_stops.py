"""When a search leads nowhere: reasons, and the last step whose gates served targets."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.torch import load, save

from dipgo_core.config import SearchSettings
from dipgo_core.search.stops import Watch, patience

SETTINGS = SearchSettings(steps=100, warmup_steps=5)  # patience 50
NEEDED = np.zeros((3, 2), dtype=np.int64)


def told(watch: Watch, values: list[float], first: int = 1) -> tuple[int, str] | None:
    """Note steps whose p_keep are all so much, the first row 1; return where it stopped and why."""
    for step, value in enumerate(values, first):
        p_keep = np.array([[1.0, 1.0], [value, value], [value, value]])
        if reason := watch.note(step, p_keep >= 0.5, p_keep, NEEDED):
            return step, reason
    return None


def begun(value: float = 0.73) -> Watch:
    return Watch(SETTINGS, np.full((3, 2), value))


@pytest.mark.parametrize(("value", "what"), [(0.9, "all"), (0.1, "none")])
def test_watch_stops_gates_that_are_alike_for_half_the_search(value, what):
    stopped = told(begun(), [value] * 100)
    assert stopped is not None and stopped[0] == 5 + 50  # not counted while it warms up
    assert f"{what} of the searched gates were kept in the last 50 steps" in stopped[1]


def test_watch_lets_gates_differ_and_keeps_the_last_good_ones():
    watch = begun()
    mixed = np.array([[1.0, 1.0], [0.2, 0.8], [0.7, 0.7]])
    assert told(watch, [0.9] * 40) is None
    assert watch.note(41, mixed >= 0.5, mixed, NEEDED) is None
    assert told(watch, [0.1] * 49, first=42) is None
    assert watch.good is not None and watch.good.search_step == 41
    assert np.array_equal(watch.good.p_keep, mixed)


def test_watch_stops_gates_that_never_move():
    mixed = np.array([[1.0, 1.0], [0.27, 0.73], [0.73, 0.27]])
    watch = Watch(SETTINGS, mixed)
    reasons = [watch.note(step, mixed >= 0.5, mixed, NEEDED) for step in range(1, 56)]
    assert reasons[:-1] == [None] * 54 and "have not moved in 55 steps" in reasons[-1]


def test_watch_goes_on_from_its_tensors():
    watch = begun()
    mixed = np.array([[1.0, 1.0], [0.2, 0.8], [0.7, 0.7]])
    watch.note(1, mixed >= 0.5, mixed, NEEDED)
    told(watch, [0.1] * 30, first=2)
    again = begun()
    again.load(load(save(watch.to_tensors())))
    assert told(again, [0.1] * 60, first=32) == told(watch, [0.1] * 60, first=32)
    assert again.good is not None and again.good.search_step == 1


def test_short_searches_are_given_fifty_steps():
    assert [patience(SearchSettings(steps=n)) for n in (10, 100, 500)] == [50, 50, 250]
