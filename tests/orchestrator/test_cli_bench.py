"""`bench`: which model is loaded, what is refused, what is printed; measured without waiting."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from dipgo_core.binding import subnet_of
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.evaluation import side_by_side
from dipgo_core.evaluation.load import undisturbed
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import block_graph, load_model
from dipgo_core.subnet import SubNet
from orchestrator.cli import main
from orchestrator.cli.bench import Asked, settings_of

TWO = SamplerSettings(scheduler="ddim", steps=2, guidance_scale=1.0)
QUICK = ("--min-runs", "2", "--min-seconds", "0", "--max-warmup", "0")


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def subnet_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two calls of tiny-dit, the second skipped."""
    model = load_model(ModelSettings(id="tiny-dit"))
    graph = block_graph(model)
    keep = np.array([[True] * graph.num_blocks, [False] * graph.num_blocks])
    path = tmp_path_factory.mktemp("bench") / "subnet.json"
    subnet_of(model, graph, TWO, GateTable(keep)).save(path)
    return str(path)


@pytest.fixture
def on_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else runs beside the tests is not waited for."""
    monkeypatch.setattr(side_by_side, "undisturbed", partial(undisturbed, sleep=lambda s: None))
    monkeypatch.setattr(side_by_side, "watches_of", lambda *args: [])


def test_bench_json_has_times_macs_and_cache(
    subnet_file: str, on_any_machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("bench", "--subnet", subnet_file, *QUICK, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["macs_speedup"]["all"] == 2.0
    assert found["latency_ms"]["value"] > 0 and found["loop_ms"]["value"] > 0
    assert found["peak_cache_bytes"] > 0 and found["device"] and found["versions"]["diffusers"]


def test_bench_prints_both_sides(
    subnet_file: str, on_any_machine: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("bench", "--subnet", subnet_file, *QUICK, "--prompt", "3") == 0
    text = capsys.readouterr().out
    for words in ("end to end", "denoising loop", "images per second", "MACs (paper)", "cache"):
        assert words in text


def test_bench_of_another_model_names_both(
    subnet_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("bench", "--subnet", subnet_file, "--model", "tiny-sd") == 2
    text = capsys.readouterr().err
    assert "DiTTransformer2DModel" in text and "load 'tiny-dit'" in text


def test_bench_without_a_gpu_says_so(
    subnet_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert call("bench", "--subnet", subnet_file, "--device", "cuda") == 1
    assert "sees no GPU" in capsys.readouterr().err


def test_bench_without_its_file_says_who_writes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", "--subnet", "none.json") == 2
    assert "`dipgo-sweep export`" in capsys.readouterr().err


def test_bench_loads_what_the_subnet_names_unless_told(subnet_file: str) -> None:
    subnet = SubNet.load(subnet_file)
    asked = Asked(subnet=subnet_file, dtype="float16")
    assert settings_of(subnet, asked) == ModelSettings(id="tiny-dit", dtype="float16")
    elsewhere = replace(asked, model="here", base="tiny-dit", resolution=64)
    expected = ModelSettings(id="here", base="tiny-dit", dtype="float16", resolution=64)
    assert settings_of(subnet, elsewhere) == expected
