"""The runtime benchmark: its keep matrices, DeepCache's schedule as gates, its page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from dipgo_core.baselines import deepcache_gates
from dipgo_core.blocks import known_graph
from dipgo_core.families import find_known
from dipgo_core.graph import BlockGraph
from dipgo_core.subnet import SubNet

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = ("turns", "rivals", "keep", "full_width", "runtime")
MIXED = sorted(path.stem for path in (FOLDER / "runtime").glob("*-mixed-*.json"))


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(FOLDER / "runtime")
    monkeypatch.syspath_prepend(FOLDER)
    yield import_module("runtime")
    for name in NAMES:
        sys.modules.pop(name, None)


def graph_of_sd15(granularity: str = "block") -> BlockGraph:
    known = find_known("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert known is not None
    return known_graph(known, granularity)


@pytest.mark.parametrize("name", MIXED)
def test_mixed_matrices_prune_their_target_and_skip_few_calls(name: str) -> None:
    subnet = SubNet.load(FOLDER / "runtime" / f"{name}.json")
    assert subnet.macs["pruned_ratio"] == pytest.approx(float(name.rsplit("-", 1)[1]), abs=0.01)
    assert subnet.gates.all_or_nothing_share <= 0.2


def test_mixed_matrices_are_what_the_script_draws(benchmark: ModuleType) -> None:
    keep = import_module("keep")
    gates = keep.mixed_gates(graph_of_sd15(), 0.5)
    assert gates == keep.keep_file("sd15-mixed-0.5").gates


def test_released_matrix_is_a_step_schedule_but_for_one_block(benchmark: ModuleType) -> None:
    """Oracle: METHOD section 6, its ten calls and the mid block of call 7."""
    gates = import_module("keep").keep_file("sd15-released-0.8").gates
    assert [c for c in range(50) if gates.keep[c, 0]] == [0, 7, 13, 19, 20, 21, 26, 32, 39, 48]
    assert (~gates.keep[[0, 7, 13, 19, 20, 21, 26, 32, 39, 48]]).sum() == 1


@pytest.mark.parametrize(
    ("branch", "kept"),
    [
        (0, {"up_blocks.3.resnets.2", "up_blocks.3.attentions.2"}),
        (
            1,
            {
                "down_blocks.0.resnets.0",
                "down_blocks.0.attentions.0",
                *(f"up_blocks.3.{kind}.{n}" for kind in ("resnets", "attentions") for n in (1, 2)),
            },
        ),
    ],
)
def test_deepcache_computes_what_lies_above_its_branch(
    benchmark: ModuleType, branch: int, kept: set[str]
) -> None:
    """Oracle: the layers that its package (0.1.1) computes for the two outermost branches."""
    graph = graph_of_sd15("layer")
    gates = deepcache_gates(graph, 4, 3, branch)
    shallow = {name for name, keep in zip(graph.names, gates.keep[1], strict=True) if keep}
    assert shallow == {"", *kept}
    assert gates.keep[[0, 3]].all()


def test_page_says_what_was_not_run(benchmark: ModuleType) -> None:
    row = benchmark.Row(
        figure="f", case="c", calls=2, rounds=6, value=0.97, low=0.96, high=0.99, goal=0.98
    )
    found = {"all-keep": {"machine": {"device": "d"}, "rows": [row.__dict__]}}
    page = benchmark.page({"cpu, bfloat16, batch 1, eager": found})
    assert "| f | c | 2 | 6 | 0.970 [0.960, 0.990] | 0.98 | within the interval |" in page
    assert "## cuda, bfloat16, batch 8, compiled\n\nnot run" in page


def test_keep_matrices_are_subnet_files_with_their_source() -> None:
    for path in (FOLDER / "runtime").glob("*.json"):
        assert json.loads(path.read_text(encoding="utf-8"))["provenance"]["source"]
