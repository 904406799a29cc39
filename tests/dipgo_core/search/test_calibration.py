"""Drawing calibration items: from seed and step alone."""

from __future__ import annotations

from dipgo_core.config import SearchSettings
from dipgo_core.search.calibration import draw_items

SETTINGS = SearchSettings(batch_size=3, accumulation=2, seed=1)


def test_draw_items_depends_on_seed_and_step_only():
    assert draw_items(SETTINGS, 7, 100) == draw_items(SETTINGS, 7, 100)
    assert draw_items(SETTINGS, 7, 100) != draw_items(SETTINGS, 8, 100)
    other = SearchSettings(batch_size=3, accumulation=2, seed=2)
    assert draw_items(SETTINGS, 7, 100) != draw_items(other, 7, 100)


def test_draw_items_repeats_none_within_a_step_while_there_are_enough():
    batches = draw_items(SETTINGS, 0, 6)
    assert [len(batch) for batch in batches] == [3, 3]
    assert sorted(sum(batches, [])) == list(range(6))


def test_draw_items_repeats_where_there_are_too_few():
    assert {i for batch in draw_items(SETTINGS, 0, 2) for i in batch} <= {0, 1}
