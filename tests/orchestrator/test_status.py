"""`status` and `plan` on a made-up sweep: failures with all that helps, costs with their basis."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dipgo_core.errors import ConfigError
from orchestrator.cli.planning import Asked, costs_on, duration, print_costs, print_wall
from orchestrator.cli.running import Command
from orchestrator.cli.status import print_status, status_json
from orchestrator.cli.sweeps import Results
from orchestrator.driver import Outlook
from orchestrator.failures import Failure, failure_record, next_attempt
from orchestrator.plan import build_plan
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from tests.orchestrator.tiny_sweep import run, tiny_facts, tiny_sweep

COMMAND = Command(Path("x.yaml"), ["targets=[0.5]"])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def results(store: Store) -> Results:
    """A new sweep whose dense run failed twice, the second time for good."""
    sweep = tiny_sweep(targets=(0.5,))
    plan = build_plan(sweep, {}, facts=tiny_facts(sweep), device="cpu")
    store.put_failure(failure_record(again(plan.ready[0]), a_bug()))
    return Results(sweep, store, plan)


def a_bug() -> Failure:
    return Failure(kind="code", error="ValueError: no", trace="Traceback\n  x.py", log="/logs/1")


def again(task: Task) -> Task:
    preempted = Failure(kind="preempted", error="the node left", host="node-3")
    found = next_attempt(task, [preempted])
    assert found is not None
    return found


def test_status_tells_class_trace_log_attempts_and_how_to_try_again(results: Results) -> None:
    (failure,) = json.loads(json.dumps(status_json(results, COMMAND)))["failures"]
    key = results.plan.ready[0].key
    assert failure["class"] == "code" and failure["log"] == "/logs/1"
    assert "x.py" in failure["traceback"]
    assert [each["failure"] for each in failure["attempts"]] == ["preempted"]
    assert failure["retry"] == f"dipgo-sweep retry x.yaml -o 'targets=[0.5]' {key[:12]}"


def test_status_prints_what_helps_to_find_the_cause(
    results: Results, capsys: pytest.CaptureFixture[str]
) -> None:
    print_status(status_json(results, COMMAND))
    text = capsys.readouterr().out
    for part in ("ValueError: no", "x.py", "/logs/1", "preempted on node-3", "dipgo-sweep retry"):
        assert part in text


def test_status_names_who_runs_the_sweep(results: Results) -> None:
    assert status_json(results, COMMAND)["runner"] is None
    with results.store.lease("tiny"):
        assert "process" in status_json(results, COMMAND)["runner"]


def outlook(store: Store) -> Outlook:
    sweep = tiny_sweep(targets=(0.5,))
    facts = tiny_facts(sweep)
    plan = build_plan(sweep, store.records(), facts=facts, device="cpu")
    return Outlook(sweep=sweep, facts=facts, device="cpu", plan=plan)


def test_plan_estimates_from_what_an_earlier_sweep_took(store: Store) -> None:
    run(tiny_sweep(targets=(0.7,)), store)  # every task of it took 0.1 s
    costs = costs_on(outlook(store), store, Asked(gpus=0, cpus_per_node=2).cluster())
    search = next(row for row in costs.rows if row.kind == "images")
    assert "records" in search.basis
    assert costs.forecast.unplaced == 0


def test_plan_prints_hours_and_basis(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    print_costs(costs_on(outlook(store), store, Asked(gpus=4).cluster()))
    text = capsys.readouterr().out
    assert "no record yet" in text and "CPU-hours" in text


def test_plan_without_a_gpu_asks_for_a_cluster(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    costs = costs_on(outlook(store), store, Asked(gpus=0, cpus_per_node=2).cluster())
    print_wall(replace(costs, gpu_hours=3.0), simulated=False)
    assert capsys.readouterr().out == (
        "no GPU here, so no wall time: give a cluster with --simulate --gpus N\n"
    )
    print_wall(costs, simulated=False)
    assert "as far as this machine goes" in capsys.readouterr().out


def test_naming_a_cluster_simulates_it() -> None:
    assert not Asked().simulated
    assert Asked(gpus=0).simulated and Asked(cpus_per_node=4).simulated


def test_cluster_has_the_gpus_asked_for() -> None:
    assert Asked(64, 8).cluster().nodes == 8
    with pytest.raises(ConfigError, match=r"--gpus 10 .* take 8 or 16"):
        Asked(10, 8).cluster()
    few = Asked(4).cluster()
    assert (few.nodes, few.gpus, few.cpus) == (1, 4, 64)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.42 s"), (12.2, "12 s"), (210, "3.5 min"), (25920, "7.2 h")]
)
def test_duration_is_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plan_leaves_records_of_another_shape_out(store: Store) -> None:
    inputs = {"of": "an older version"}
    key = Task(kind="search", inputs=inputs).key
    store.put_record(Record(key=key, kind="search", state="done", inputs=inputs))
    costs = costs_on(outlook(store), store, Asked(gpus=0, cpus_per_node=2).cluster())
    assert all("no record yet" in row.basis for row in costs.rows)
