"""A sweep sent to a cluster as a job: a local model goes along, and a laptop follows it."""

from __future__ import annotations

import json
import shutil
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from dipgo_core.zoo import zoo_path
from orchestrator.store import open_store
from tests.cluster.drivers import PROGRAM
from tests.cluster.harness import Cluster
from tests.cluster.processes import start

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("ignore")]

TEXT = """
schema_version: 1
name: sent
objective: {{speed: macs, quality: psnr}}
models:
  - name: mine
    id: ./model
    sampler: {{scheduler: ddim, steps: 4, guidance_scale: 3.0}}
search: {{strategy: dipgo, steps: {steps}, batch_size: 1, query_dim: 16}}
targets: [0.4]
baselines: []
evaluate: {{images: 8, metrics: [psnr], batch_size: 8}}
resources: {{search: {{cpus: 1, gpus: 0}}}}
storage: {folder}/store
tracking: {{uri: "sqlite:///{folder}/mlflow.db"}}
"""

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def server(own_cluster: Cluster) -> str:
    return own_cluster.start_head(cpus=1, dashboard=True)


@pytest.fixture
def laptop(own_cluster: Cluster, server: str, tmp_path: Path) -> Cli:
    """The command line in a folder with a sweep, told where the cluster is."""
    folder = tmp_path / "laptop"
    shutil.copytree(zoo_path("tiny-dit"), folder / "model")
    calls = iter(range(100))

    def call(verb: str, *options: str, steps: int = 2) -> tuple[int, str]:
        (folder / "sweep.yaml").write_text(TEXT.format(folder=tmp_path, steps=steps))
        words = [verb, "sweep.yaml", "--address", server, *options]
        command = [sys.executable, "-c", PROGRAM, *words]
        name = f"{verb}-{next(calls)}"
        child = start(name, command, tmp_path / "logs", own_cluster.environment(), folder)
        child.process.wait(timeout=300)
        return child.process.returncode, child.stdout() + child.stderr()

    return call


def test_sweep_is_sent_once_followed_and_stopped(
    laptop: Cli, server: str, own_cluster: Cluster, tmp_path: Path
) -> None:
    with pytest.raises(urllib.error.HTTPError, match="401"):  # nobody without the token
        urllib.request.urlopen(f"{server}/api/jobs/")
    code, told = laptop("submit")
    assert code == 0, told + own_cluster.told()
    code, told = laptop("logs", "-f")
    assert code == 0, told
    assert "0 failed, 0 not run" in told, told
    records = open_store(tmp_path / "store").records()
    assert {record.kind for record in records.values()} >= {"reference", "search", "evaluate"}
    code, told = laptop("status", "--json")
    assert code == 0 and json.loads(told[told.index("{") :])["job"]["status"] == "SUCCEEDED", told

    assert laptop("submit", steps=5000)[0] == 0  # another search: long enough to be stopped
    code, told = laptop("submit", steps=5000)
    assert code == 0 and "nothing was sent" in told, told
    code, told = laptop("submit", steps=6000)
    assert code == 2 and "other settings" in told, told
    code, told = laptop("stop", "--now")
    assert code == 0 and "is ended" in told, told
    assert "stopped" in laptop("status")[1]
