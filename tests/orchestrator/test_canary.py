"""No secret gets out: canaries in URIs and in the environment, and everything is searched for them.

Oracle: a search of bytes over the store, the tracking database and its artifacts, all that was
logged and printed, and the arguments of every process.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import ConfigError
from orchestrator.background import BackgroundTracker
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.publish import Publisher
from orchestrator.records import Record, Task
from orchestrator.secrets import redact_logs
from orchestrator.store import Store, open_store
from orchestrator.tracking import MlflowTracker
from tests.orchestrator.finished_sweep import run_finished_task, sweep_facts
from tests.orchestrator.tiny_sweep import ALL_BASELINES, tiny_sweep

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

#: What must not be found; the words are made at run time, so that no source line holds them whole.
NAMES = (
    "HF_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "RAY_AUTH_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
CANARIES = {name: f"can{'ary'}-{number}-{name.lower()[::-1]}" for number, name in enumerate(NAMES)}
URI_CANARY = f"can{'ary'}-in-the-uri"
ALL = (*CANARIES.values(), URI_CANARY)
URI = f"http://somebody:{URI_CANARY}@127.0.0.1:1"


def found_in(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [canary for canary in ALL if canary.encode() in data]


def found_under(folder: Path) -> dict[str, list[str]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    hits = {str(path): found_in(str(path)) + found_in(path.read_bytes()) for path in files}
    return {path: canaries for path, canaries in hits.items() if canaries}


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


@pytest.fixture
def all_logs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    monkeypatch.setattr(logging, "raiseExceptions", True)
    redact_logs()
    root = logging.getLogger()
    before, handler = root.level, logging.StreamHandler()
    root.setLevel(logging.DEBUG)
    logging.getLogger("matplotlib").setLevel(logging.INFO)
    root.addHandler(handler)
    yield
    root.removeHandler(handler)
    root.setLevel(before)


def leaking_task(task: Task, store: Store, *, on_progress: Any = None) -> Record:
    """Fail some tasks with all secrets in the message, as a library might."""
    if task.kind == "latency" or "random" in task.label:
        told = f"401 for {URI}/api with {', '.join(CANARIES.values())}"
        try:
            raise OSError(told)
        except OSError as error:
            raise RuntimeError(f"cannot go on: {told}") from error
    return run_finished_task(task, store)


@pytest.mark.parametrize("uri", [URI, "sqlite"], ids=["server", "sqlite"])
def test_no_secret_leaves_a_sweep(
    uri: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    all_logs: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if uri == "sqlite":
        uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    sweep = tiny_sweep(targets=(0.5,), baselines=ALL_BASELINES)
    sweep = replace(sweep, tracking=replace(sweep.tracking, uri=uri))
    store = open_store(str(tmp_path / "store"))
    tracker = BackgroundTracker(MlflowTracker("canaries", uri))
    result = run_sweep(
        sweep,
        store,
        InProcessExecutor(),
        Publisher(sweep, store, tracker),
        run_task=leaking_task,
        facts=sweep_facts(sweep),
    )
    assert result.failed and result.done
    printed = capfd.readouterr()
    assert "cannot go on: 401 for http://***@127.0.0.1:1" in caplog.text  # the logs are there
    assert found_in(printed.out + printed.err + caplog.text) == []
    assert found_in(repr(result)) == []
    assert found_under(tmp_path) == {}


# --- the command line ----------------------------------------------------------------------------

SWEEP = """schema_version: 1
name: canaries
models:
  - {id: tiny-sd, sampler: {scheduler: ddim, steps: 2}}
targets: [0.5]
search:
  steps: 1
  calibration: {images: 2, batch_size: 2}
baselines: []
evaluate: {images: 4, metrics: [psnr, latency]}
latency: {min_runs: 6, min_seconds: 0, warmup: 0, max_warmup: 0, tries: 1}
storage: store
tracking:
  uri: ${CANARY_URI}
"""


CLI = "from orchestrator.cli import main; main()"


class Watch:
    """Looks at the arguments of every process, until it is told to stop."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self.seen = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    arguments = path.read_bytes()
                except OSError:
                    continue
                self.seen += 1
                if found_in(arguments):
                    self.found[str(path)] = found_in(arguments)


def call(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CLI, "--verbose", *arguments]
    environment = {**os.environ, "CANARY_URI": URI, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500
    )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="no list of processes")
def test_no_secret_leaves_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text(SWEEP, encoding="utf-8")
    with Watch() as watch:
        ran = call(tmp_path, "run", "s.yaml", "--executor", "local")
        others = [
            call(tmp_path, *words, "s.yaml")
            for words in (("validate", "--json"), ("status",), ("ui",), ("sync",))
        ]
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "at http://***@127.0.0.1:1" in ran.stderr  # the tracking server is away
    assert [each.returncode for each in others] == [0, 0, 0, 1]
    for each in (ran, *others):
        assert found_in(each.stdout + each.stderr) == []
    assert watch.seen and watch.found == {}
    assert found_under(tmp_path) == {}


@pytest.mark.parametrize("in_file", [False, True])
def test_submit_refuses_to_send_a_password(in_file: bool, tmp_path: Path) -> None:
    from orchestrator.cli.jobs import submit_and_show

    text = (
        SWEEP.replace("${CANARY_URI}", URI) if in_file else SWEEP.replace("${CANARY_URI}", "x.db")
    )
    (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
    overrides = [] if in_file else [f"tracking.uri={URI}"]
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_URI on the cluster") as refused:
        submit_and_show(tmp_path / "s.yaml", overrides, "http://127.0.0.1:1")
    assert found_in(str(refused.value)) == []


def test_ui_hands_the_uri_over_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from orchestrator.cli import main

    called: list[Any] = []
    monkeypatch.setattr(
        "orchestrator.cli.app.subprocess.call",
        lambda command, env: called.append((command, env)) or 0,
    )
    database = f"postgresql://me:{URI_CANARY}@127.0.0.1/db"
    monkeypatch.setenv("CANARY_URI", database)
    (tmp_path / "s.yaml").write_text(SWEEP, encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["ui", str(tmp_path / "s.yaml")])
    ((command, environment),) = called
    assert ended.value.code == 0 and found_in(" ".join(command)) == []
    assert environment["MLFLOW_BACKEND_STORE_URI"] == database
    assert found_in("".join(capfd.readouterr())) == []
