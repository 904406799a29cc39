"""Tasks that fit nowhere, on clusters that are made up."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from dipgo_core.errors import TaskError
from orchestrator.executors.nowhere import END_S, WARN_S, Nowhere, refuse_unplaceable
from orchestrator.executors.placement import Bundle
from orchestrator.records import Pool

NODES: Any = [
    {"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0, "node:10.0.0.1": 1.0, "memory": 9.0}}
    for name in "ab"
]
SMALL, LARGE = Pool(), Pool(cpus=2, gpus=1)
NAMED = {SMALL: ["resources.score"], LARGE: ["resources.evaluate", "resources.search"]}
WORDS = (
    "no node can hold tasks of resources.evaluate, resources.search: each asks for 2 CPU, 1 GPU; "
    "the cluster has 2 x (4 CPU). Ask for less in the sweep file (resources.evaluate: cpus, gpus, "
    "accelerator), or add a node that has it"
)


def bundle(pool: Pool) -> Bundle:
    return {"CPU": pool.cpus, **({"GPU": pool.gpus} if pool.gpus else {})}


def nowhere(*, scales: bool = False) -> Nowhere:
    return Nowhere(bundle, lambda: scales)


def tell(one: Nowhere, now: float, *, stuck: bool) -> None:
    one.tell(lambda: NAMED, NODES, now, stuck=stuck)


def test_look_finds_what_no_node_holds() -> None:
    assert nowhere().look({SMALL: 1, LARGE: 2}, NODES, 0.0) == {LARGE}
    assert nowhere().look({LARGE: 2}, [], 0.0) == frozenset()  # nothing is known of the cluster


def test_tell_warns_once_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    one, told = nowhere(), []
    with caplog.at_level(logging.WARNING):
        for now in (1.0, WARN_S, 2 + WARN_S, 9 * WARN_S):
            one.look({LARGE: 1}, NODES, now)
            tell(one, now, stuck=False)
            told.append(len(caplog.messages))
    assert told == [0, 0, 1, 1]
    assert caplog.messages == [WORDS]


def test_tell_ends_a_run_that_has_nothing_else_to_do() -> None:
    one = nowhere()
    one.look({LARGE: 1}, NODES, 1.0)
    tell(one, 1.0, stuck=True)
    tell(one, END_S, stuck=False)  # something ran meanwhile
    tell(one, END_S + 5, stuck=True)
    tell(one, 2 * END_S, stuck=True)
    with pytest.raises(TaskError, match=r"nothing else can be done:\nno node can hold"):
        tell(one, 2 * END_S + 5, stuck=True)


def test_tell_waits_for_an_autoscaler() -> None:
    one = nowhere(scales=True)
    one.look({LARGE: 1}, NODES, 1.0)
    for now in (1.0, 10 * END_S):
        tell(one, now, stuck=True)


def test_refuse_names_what_does_not_fit() -> None:
    refuse_unplaceable({SMALL: ["resources.score"]}, bundle, NODES)
    with pytest.raises(TaskError) as refused:
        refuse_unplaceable(NAMED, bundle, NODES)
    assert str(refused.value) == WORDS
