"""Storage that is full, read-only or slow: a clear end, nothing torn, and it goes on afterwards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cluster.checker import check_artifacts
from tests.cluster.drivers import TASKS, EngineSweep, moment
from tests.cluster.harness import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

RUN_S = 150.0
MEGABYTES = 4


@dataclass(frozen=True)
class SmallDisk:
    """A file system of its own, which can be filled and made read-only."""

    folder: Path

    def fill(self) -> None:
        with suppress(OSError), (self.folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"\0" * 4096)

    def empty(self) -> None:
        (self.folder / "filler").unlink()

    def mount(self, *options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(self.folder)]
        subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if os.geteuid() != 0:
        pytest.skip("mounts a small file system, which only root may")
    small = SmallDisk(tmp_path / "disk")
    small.folder.mkdir()
    try:
        small.mount(f"size={MEGABYTES}m")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no file system can be mounted here: {error.stderr.decode().strip()}")
    yield small
    subprocess.run(["umount", "--lazy", str(small.folder)], check=True)


def refused(engine: EngineSweep) -> None:
    """Let the last run end badly, but clearly, with everything that was told still there."""
    child = engine.runs[-1]
    assert child.wait(RUN_S) != 0, child.told()
    assert "Traceback" not in child.stderr(), child.told()
    check_artifacts(engine.storage)
    assert len(engine.acks()) < TASKS


def goes_on(engine: EngineSweep) -> None:
    child = engine.run()
    assert child.wait(RUN_S) == 0, child.told()
    engine.checked()
    check_artifacts(engine.storage)


def test_full_disk(cluster: Cluster, engine: EngineSweep, disk: SmallDisk) -> None:
    cluster.with_nodes(2)
    engine.storage = disk.folder / "store"
    child = engine.run()
    engine.wait_for_acks(moment("full"), child)
    disk.fill()
    refused(engine)
    disk.empty()
    goes_on(engine)


def test_read_only_storage(cluster: Cluster, engine: EngineSweep, disk: SmallDisk) -> None:
    cluster.with_nodes(2)
    engine.storage = disk.folder / "store"
    child = engine.run()
    engine.wait_for_acks(moment("read-only"), child)
    disk.mount("remount", "ro")
    refused(engine)
    disk.mount("remount", "rw")
    goes_on(engine)


def test_slow_storage(cluster: Cluster, engine: EngineSweep) -> None:
    """Every operation takes a fifth of a second, on workers and in the driver."""
    cluster.with_nodes(2)
    engine.slow, engine.seconds = 0.2, 0.2
    child = engine.run()
    assert child.wait(RUN_S) == 0, child.told()
    engine.checked()
    assert len(engine.acks()) == TASKS
