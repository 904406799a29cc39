"""The tracking server is away in the middle of a real sweep: for a while, then for good."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import MlflowServer

from tests.cluster.checker import check_equal, check_mlflow, mlflow_runs
from tests.cluster.drivers import RealSweep, moment
from tests.cluster.harness import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

RUN_S = 300.0
AWAY_S = 30.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    (tmp_path / "server").mkdir()
    started = MlflowServer(tmp_path / "server")
    started.start()
    yield started
    started.kill()


def test_server_that_is_away_delays_nothing_and_gets_everything(
    cluster: Cluster, real: RealSweep, undisturbed: RealSweep, server: MlflowServer
) -> None:
    """Away for half a minute, the run itself sends the rest or `sync` does; for good, `sync`."""
    database = server.folder / "server.db"
    cluster.with_nodes(2)
    real.overrides = (f"tracking.uri={server.url}",)
    child = real.run()
    real.wait_for_acks(moment("tracking"), child)
    server.kill()
    time.sleep(AWAY_S)
    assert child.code in (None, 0), child.told()
    server.start()
    assert child.wait(RUN_S) == 0, child.told()
    real.checked()
    check_equal(real.storage, undisturbed.storage)
    assert real.call("sync").wait(RUN_S) == 0, real.runs[-1].told()
    first = set(mlflow_runs(undisturbed.database)) - _parents(undisturbed.database)
    check_mlflow(database, first)

    server.kill()  # for good, as far as the next run can tell
    real.overrides = (*real.overrides, "targets=[0.4, 0.6]")
    again = real.run()
    assert again.wait(RUN_S) == 0, again.told()
    server.start()
    assert real.call("sync").wait(RUN_S) == 0, real.runs[-1].told()
    points = {point["key"] for point in real.json("pareto")["points"]}
    assert points - first
    check_mlflow(database, first | points)


def _parents(database: Path) -> set[str]:
    """Return the keys of the sweep's own runs, which name the tracking server."""
    query = (
        "SELECT a.value FROM tags a JOIN tags b ON a.run_uuid = b.run_uuid "
        "WHERE a.key = 'dipgo.task_key' AND b.key = 'dipgo.kind' AND b.value = 'sweep'"
    )
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        return {row[0] for row in connection.execute(query)}
