"""A tracking server that is away during a sweep. Oracle: the store, and a real MLflow server.

The server is killed by its process id in the middle of the sweep's tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow_server import MlflowServer

from orchestrator.background import BackgroundTracker
from orchestrator.cli.syncing import as_result
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.plan import build_plan
from orchestrator.planned import Plan
from orchestrator.publish import Publisher
from orchestrator.records import Record, Task
from orchestrator.store import Store, open_store
from orchestrator.sweep_settings import SweepFile
from orchestrator.sweep_tasks import RunResult
from orchestrator.tracking import KEY_TAG, MlflowTracker
from tests.orchestrator.finished_sweep import finish, run_finished_task, sweep_facts
from tests.orchestrator.tiny_sweep import tiny_sweep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
SEARCHES = 6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    (tmp_path / "server").mkdir()
    server = MlflowServer(tmp_path / "server")
    server.start()
    yield server
    server.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("orchestrator.tracking.RETRY_S", 0.2)


def a_sweep(name: str) -> SweepFile:
    alphas = [1.0 + n for n in range(SEARCHES)]
    return replace(tiny_sweep(targets=(0.5,), alphas=alphas, metrics=("clip", "psnr")), name=name)


def run(sweep: SweepFile, store: Store, url: str, at: dict[int, Callable[[], None]]) -> RunResult:
    """Run a sweep; `at` says what happens to the world before which search is done."""
    searches = 0

    def run_task(task: Task, store: Store, *, on_progress: Any = None) -> Record:
        nonlocal searches
        if task.kind == "search":
            searches += 1
            at.get(searches, lambda: None)()
        return run_finished_task(task, store)

    tracker = BackgroundTracker(MlflowTracker("outages", url))
    publisher = Publisher(sweep, store, tracker)
    facts = sweep_facts(sweep)
    return run_sweep(sweep, store, InProcessExecutor(), publisher, run_task=run_task, facts=facts)


def shown(url: str, sweep: SweepFile) -> dict[str, str]:
    """Return the status of every run of a sweep by its key; fails on a duplicate."""
    client = MlflowClient(tracking_uri=url)
    experiment = client.get_experiment_by_name("outages")
    assert experiment is not None
    found = client.search_runs(
        [experiment.experiment_id], filter_string=f"tags.`dipgo.sweep` = '{sweep.name}'"
    )
    statuses = {run.data.tags[KEY_TAG]: run.info.status for run in found}
    assert len(statuses) == len(found)
    return statuses


def entries_of(plan: Plan) -> set[str]:
    return {*plan.searches, *(point.key for point in plan.points)}


@pytest.mark.slow
def test_outage_in_the_middle_leaves_no_gap(server: MlflowServer, tmp_path: Path) -> None:
    sweep, store = a_sweep("gap"), open_store(str(tmp_path / "store"))
    result = run(sweep, store, server.url, {2: server.kill, 5: server.start})
    assert result.plan.complete and not result.failed
    statuses = shown(server.url, sweep)
    assert len(statuses) == len(entries_of(result.plan)) + 1  # and the sweep's own
    assert entries_of(result.plan) <= set(statuses) and set(statuses.values()) == {"FINISHED"}


@pytest.mark.slow
def test_outage_for_good_stops_nothing_and_sync_sends_it(
    server: MlflowServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sweep, store = a_sweep("for-good"), open_store(str(tmp_path / "store"))
    result = run(sweep, store, server.url, {2: server.kill})
    assert result.plan.complete and not result.failed
    assert "`dipgo-sweep sync` sends them" in caplog.text
    server.start()
    plan = build_plan(sweep, store.records(), facts=sweep_facts(sweep), device="cpu")
    for _ in range(2):  # a second time changes nothing
        publisher = Publisher(sweep, store, MlflowTracker("outages", server.url))
        publisher.start(sweep, plan)
        publisher.finish(as_result(plan, store))
        statuses = shown(server.url, sweep)
        assert entries_of(plan) <= set(statuses) and set(statuses.values()) == {"FINISHED"}


def test_unreachable_server_at_the_start_holds_nothing_up(tmp_path: Path) -> None:
    """Nothing listens on port 1; the sweep is run and shown as far as it can be."""
    sweep, store = a_sweep("unreachable"), open_store(str(tmp_path))
    result = run(sweep, store, "http://127.0.0.1:1", {})
    assert result.plan.complete and not result.failed


def test_result_of_a_store_tells_what_is_left(tmp_path: Path) -> None:
    sweep, store = a_sweep("partly"), open_store(str(tmp_path))
    failing = finish(sweep, store, fails=lambda task: task.kind == "search")
    result = as_result(failing.plan, store)
    assert len(result.failed) == SEARCHES and not result.interrupted
    assert set(result.skipped) | set(result.failed) | set(result.cached) == {
        task.key for task in failing.plan.tasks
    }
