"""No secret of a worker's environment gets into what Ray keeps. Oracle: a search of its folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.executors.placement import NODE
from orchestrator.records import Record, Task
from orchestrator.store import open_store
from tests.orchestrator.executors.test_contract import ListSource, task

pytestmark = pytest.mark.filterwarnings("ignore")
#: Made at run time, so that no source line holds them whole.
CANARIES = {"HF_TOKEN": f"can{'ary'}/of+the=token", "DB_PASSWORD": f'can{"ary"}"of the\\db'}


@pytest.fixture
def session(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Start a Ray of one node whose workers have secrets; return the folder it writes to."""
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray = pytest.importorskip("ray")
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=128 * 2**20,
            resources={NODE: 1.0},
        )
        yield Path(ray._private.worker._global_node.get_session_dir_path())
        ray.shutdown()


def leaking_task(names: tuple[str, ...]) -> Any:
    """A task function that logs secrets and fails with them; workers get it by value."""

    def run_task(task: Task, store: Any, *, on_progress: Any = None) -> Record:
        import logging

        told = f"cannot go on: {[os.environ[name] for name in names]}"
        try:
            raise OSError(told)
        except OSError as error:
            logging.getLogger("somebody").exception(told)
            raise RuntimeError(told) from error

    return run_task


def found_under(folder: Path, words: list[str]) -> dict[str, list[str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    hits = {str(path): [w for w in words if w.encode() in path.read_bytes()] for path in files}
    return {path: words for path, words in hits.items() if words}


@pytest.mark.slow
def test_no_secret_stays_in_rays_session_folder(session: Path, tmp_path: Path) -> None:
    from orchestrator.executors.ray_tune.run import RayTuneExecutor

    source = ListSource([task(1)])
    with RayTuneExecutor() as executor:
        executor.run(source, leaking_task(tuple(CANARIES)), open_store(tmp_path))
    (failure,) = source.failures.values()
    words = [value[:12] for value in CANARIES.values()]
    assert "cannot go on: ['***', '***']" in failure.error
    assert not [word for word in words if word in failure.error + failure.trace]
    assert found_under(session, ["cannot go on"])  # the worker's log is there
    assert found_under(session, words) == {}
    assert found_under(tmp_path, words) == {}
