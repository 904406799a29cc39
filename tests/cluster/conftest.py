"""One cluster for all tests that leave it alive; every process is ended by its id."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.drivers import EngineSweep, RealSweep
from tests.cluster.harness import Cluster
from tests.cluster.processes import Child, kill_at_once


@pytest.fixture(scope="session", autouse=True)
def ended_by_a_signal() -> None:
    """Whoever ends the tests from outside (a CI at its limit) leaves no cluster behind."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a short name: Ray's sockets lie in it, whose paths have at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dipgo-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def cluster(short_folder: Path) -> Iterator[Cluster]:
    """A head and whatever nodes a test wants to have."""
    started = Cluster(short_folder / "c")
    try:
        started.start_head()
        yield started
    finally:
        started.stop()


@pytest.fixture
def own_cluster(short_folder: Path) -> Iterator[Cluster]:
    """A cluster that the test may destroy."""
    started = Cluster(Path(tempfile.mkdtemp(dir=short_folder)), octet=251)
    try:
        yield started
    finally:
        started.stop()


@pytest.fixture
def engine(cluster: Cluster, tmp_path: Path) -> Iterator[EngineSweep]:
    """A sweep of made-up tasks that nobody has run yet."""
    sweep = EngineSweep(cluster, tmp_path)
    yield sweep
    end(sweep.runs)


@pytest.fixture
def real(cluster: Cluster, tmp_path: Path) -> Iterator[RealSweep]:
    """A sweep of a bundled model that nobody has run yet."""
    sweep = RealSweep(cluster, tmp_path)
    yield sweep
    end(sweep.runs)


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSweep]:
    """The same sweep, run to its end without a fault."""
    sweep = RealSweep(cluster, tmp_path_factory.mktemp("undisturbed"))
    cluster.with_nodes(2)
    try:
        child = sweep.run()
        assert child.wait(300) == 0, child.told()
        sweep.checked()
        yield sweep
    finally:
        end(sweep.runs)


def end(children: list[Child]) -> None:
    """End what still runs of the processes that a test started."""
    for child in children:
        if child.code is None:
            kill_at_once([child.pid])
            child.process.wait(timeout=20)
