"""What planning knows of strategies. Oracles: the registry, the settings, forwards counted."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from dipgo_core.config import LossSettings, SearchSettings
from dipgo_core.search import STRATEGIES
from dipgo_core.strategies import (
    NEEDS,
    READS,
    TABLE_STRATEGIES,
    ErrorsSettings,
    decisive,
    effective,
    mask_forwards,
)

OTHER = SearchSettings(
    loss=LossSettings(alpha=0.3),
    steps=7,
    seed=3,
    query_dim=8,
    samples=5,
    effort=77,
    objective="latent",
    staleness=2,
)


def test_every_strategy_is_known_to_planning() -> None:
    assert set(READS) == set(STRATEGIES)
    assert set(NEEDS) <= set(READS) and set(READS) >= TABLE_STRATEGIES


def test_strategies_read_fields_that_there_are() -> None:
    names = {field.name for field in fields(SearchSettings)}
    assert all(set(read) <= names for read in READS.values())


@pytest.mark.parametrize("strategy", READS)
def test_effective_settings_differ_in_what_is_read_alone(strategy: str) -> None:
    asked = replace(OTHER, strategy=strategy)
    found, plain = effective(asked), SearchSettings(strategy=strategy)
    changed = {f.name for f in fields(asked) if getattr(asked, f.name) != getattr(plain, f.name)}
    kept = {f.name for f in fields(found) if getattr(found, f.name) != getattr(plain, f.name)}
    assert kept == changed & set(READS[strategy])
    assert effective(found) == found


@pytest.mark.parametrize("strategy", READS)
def test_decisive_fields_give_the_effective_settings_back(strategy: str) -> None:
    asked = replace(OTHER, strategy=strategy)
    told = decisive(asked)
    loss = {"loss": LossSettings(**told["loss"])} if "loss" in told else {}
    assert SearchSettings(**{**told, **loss}) == effective(asked)


def test_measured_errors_depend_on_what_all_that_need_them_read() -> None:
    """Else two searches of equal settings would go by other errors."""
    decides = {field.name for field in fields(ErrorsSettings)} - {"granularity"}
    for strategy, needs in NEEDS.items():
        assert "errors" not in needs or decides <= set(READS[strategy])
    assert ErrorsSettings.of(OTHER).search == SearchSettings(objective="latent", staleness=2)


@pytest.mark.parametrize(("calls", "counted"), [(8, 37), (14, 71), (20, 81), (50, 225)])
def test_forwards_for_step_masks_are_about_those_counted(calls: int, counted: int) -> None:
    """Oracle: searches on a tiny U-Net, the mean over targets from .3 to .8."""
    assert mask_forwards(calls) == pytest.approx(counted, rel=0.15)
