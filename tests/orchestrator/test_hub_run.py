"""A sweep whose model, scorer and prompts come from the hub. Oracle: a fake hub and its log."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants

from dipgo_core.zoo import zoo_path
from orchestrator.cli.sweeps import open_results
from orchestrator.driver import run_sweep
from orchestrator.executors.in_process import InProcessExecutor
from orchestrator.records import Record
from orchestrator.store import open_store
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_tasks import RunResult

SWEEP = """
schema_version: 1
name: x
models:
  - {name: m, id: owner/tiny, family: sd, sampler: {steps: 4, guidance_scale: 1.0}}
targets: [0.5]
search: {steps: 1, query_dim: 8, calibration: {prompts: bundled:calibration, images: 2}}
baselines: [uniform]
evaluate:
  prompts: {hub: owner/words, file: p.txt}
  images: 2
  metrics: [psnr, clip]
  scorers: {clip: owner/clip}
allow_unpinned: true
"""


class Nobody:
    """An audience that looks away."""

    def start(self, *args: Any) -> None: ...

    def landed(self, *args: Any) -> None: ...

    def finish(self, *args: Any) -> None: ...


def files_of(name: str) -> dict[str, bytes]:
    folder = zoo_path(name)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def file(tmp_path: Path, fake_hub: FakeHub) -> Path:
    fake_hub.put("owner/tiny", files_of("tiny-sd"))
    fake_hub.put("owner/clip", files_of("tiny-clip"))
    fake_hub.put("owner/words", {"p.txt": b"a\nb\nc\n"}, kind="dataset")
    (tmp_path / "x.yaml").write_text(f"{SWEEP}storage: {tmp_path / 'store'}\n")
    return tmp_path / "x.yaml"


def run(file: Path) -> tuple[RunResult, list[Record]]:
    sweep = load_sweep(file)
    store = open_store(sweep.storage)
    result = run_sweep(sweep, store, InProcessExecutor(), Nobody())
    assert result.failed == {}
    return result, [store.records()[key] for key in result.done]


@pytest.mark.slow
def test_results_are_kept_under_commits_and_read_without_network(
    file: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, records = run(file)
    tiny, clip, _ = (repo.main for repo in fake_hub.repos.values())
    assert {record.inputs["model"]["weights_sha256"] for record in records} == {
        f"hub:owner/tiny@{tiny}"
    }
    assert {
        record.outputs["metrics"]["clip"]["scorer"]
        for record in records
        if record.kind == "evaluate" and "clip" in record.outputs["metrics"]
    } == {"owner/clip"}
    assert set(fake_hub.downloads.values()) == {1}
    assert run(file)[0].done == ()

    moved = fake_hub.put("owner/tiny", {**files_of("tiny-sd"), "README.md": b"new"})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert open_results(file, []).plan.complete  # with the commits of the run
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    second, records = run(file)
    assert not set(second.done) & set(first.done)
    assert {record.inputs["model"]["revision"] for record in records} == {moved}


def test_environment_of_the_hub_is_honoured(
    file: Path, fake_hub: FakeHub, tmp_path: Path, repository: Path
) -> None:
    environment = {
        **os.environ,
        "HF_ENDPOINT": fake_hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(repository),
    }
    code = "import sys; from orchestrator.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "prefetch", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["cache"] == str(tmp_path / "home" / "hub")
    assert document["fetched"]
    offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=offline)
    assert done.returncode == 2
    assert "HF_HUB_OFFLINE is set" in done.stderr
