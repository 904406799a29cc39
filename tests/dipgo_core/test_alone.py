"""A SubNet runs where nothing of the orchestrator is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from dipgo_core.binding import subnet_of
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import block_graph, load_model

#: Refuses what only the orchestrator needs, then does what a user does.
SCRIPT = '''
import sys

REFUSED = {"orchestrator", "ray", "mlflow", "typer", "moocore"}  # yaml: diffusers needs it

class Without:
    """A finder of modules that does not find what is refused."""

    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in REFUSED:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = map(Without, sys.meta_path)

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from dipgo_core.evaluation.bench import bench
from dipgo_core.runtime import apply_subnet
from dipgo_core.subnet import SubNet

subnet = SubNet.load(sys.argv[2])
pipe = DiffusionPipeline.from_pretrained(sys.argv[1], safety_checker=None)
pipe.scheduler = DDIMScheduler.from_config(subnet.sampler["config"])
pipe.set_progress_bar_config(disable=True)
with apply_subnet(pipe, subnet) as handle:
    images = pipe("a red bag", **subnet.call_kwargs()).images
print(images[0].size, handle.peak_cache_bytes > 0, REFUSED & set(sys.modules))
'''


def test_subnet_runs_without_the_orchestrator(tmp_path: Path) -> None:
    model = load_model(ModelSettings(id="tiny-sd"))
    graph = block_graph(model)
    keep = np.array([[True] * graph.num_blocks, [False] * graph.num_blocks] * 2)
    sampler = SamplerSettings(scheduler="ddim", steps=4, guidance_scale=3.0)
    subnet_of(model, graph, sampler, GateTable(keep)).save(tmp_path / "subnet.json")
    folder = Path(model.pipe.config._name_or_path)
    arguments = ["-c", SCRIPT, str(folder), str(tmp_path / "subnet.json")]
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "(32, 32) True set()"
