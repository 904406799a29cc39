"""`models` and `models show`: figures against traces, and what is drawn."""

from __future__ import annotations

import functools
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from dipgo_core.config import Granularity
from dipgo_core.families import KNOWN_MODELS, calls_of, find_known
from dipgo_core.graph import INPUT, BlockGraph
from dipgo_core.outline import Outline, outline_of
from orchestrator.cli import main, model_graph
from orchestrator.cli.model_graph import MOST_RAILS, print_graph, reads_text
from orchestrator.cli.models import searched_gates
from orchestrator.cli.rails import rail_cells, rails_of

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


@functools.cache
def traced(model_id: str, granularity: Granularity = "block") -> Outline:
    return outline_of(model_id, granularity=granularity)


def graph_of(model_id: str, granularity: Granularity = "block") -> BlockGraph:
    return traced(model_id, granularity).graph


def shown(
    model_id: str, width: int, granularity: Granularity, monkeypatch: pytest.MonkeyPatch
) -> list[str]:
    """The lines that a terminal of this width shows."""
    stream = io.StringIO()
    target = Console(file=stream, width=width, highlight=False)
    monkeypatch.setattr(model_graph, "console", lambda: target)
    print_graph(traced(model_id, granularity))
    return stream.getvalue().splitlines()


# --- the list ---


def test_models_json_names_every_known_model_with_its_costs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call("models", "--json") == 0
    families = json.loads(capsys.readouterr().out)["families"]
    listed: dict[str, Any] = {m["id"]: m for family in families for m in family["models"]}
    assert set(listed) == {known.id for known in KNOWN_MODELS}
    sd15 = listed[SD15]
    assert (sd15["calls"], sd15["gates"]["block"]) == (50, 500)
    assert all(family["pipelines"] and family["schedulers"] for family in families)


def test_models_of_the_table_name_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models") == 0
    text = capsys.readouterr().out
    assert [known.id for known in KNOWN_MODELS if known.id not in text] == []


@pytest.mark.parametrize("model_id", ["tiny-sd", "tiny-dit"])
@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_searched_gates_are_those_of_a_trace(model_id: str, granularity: Granularity) -> None:
    known = find_known(model_id)
    assert known is not None
    searched = len(graph_of(model_id, granularity).searched) * (calls_of(known.sampler) - 1)
    assert searched_gates(known, known.gates_of(granularity)) == searched


# --- rails ---


@pytest.mark.parametrize("granularity", ["block", "layer"])
def test_rails_are_the_edges_that_pass_over_blocks(granularity: Granularity) -> None:
    graph = graph_of("tiny-sd", granularity)
    edges = {
        (source, row)
        for row in range(1, graph.num_blocks)
        for source in graph.producers[row]
        if source not in (INPUT, row - 1)
    }
    rails = rails_of(graph, MOST_RAILS)
    assert {(rail.source, row) for rail in rails for row in rail.readers} == edges


def test_rails_that_run_side_by_side_have_columns_of_their_own() -> None:
    graph = graph_of("tiny-sd", "layer")
    for row in range(1, graph.num_blocks):
        here = [r for r in rails_of(graph, MOST_RAILS) if r.source <= row <= r.end]
        assert len({rail.column for rail in here}) == len(here)


def test_rails_of_a_unet_are_nested_without_crossing() -> None:
    graph = graph_of("tiny-sd", "layer")
    rails = rails_of(graph, MOST_RAILS)
    cells = "".join(rail_cells(rails, row) for row in range(1, graph.num_blocks))
    assert "─│" not in cells and cells.count("╮") == cells.count("╯") == len(rails)


def test_no_rails_where_every_layer_reads_all_before() -> None:
    assert rails_of(graph_of("tiny-dit", "layer"), MOST_RAILS) == ()


# --- the drawing ---


@pytest.mark.parametrize("width", [50, 80, 200])
def test_drawing_has_a_row_a_block_within_the_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = shown("tiny-sd", width, "block", monkeypatch)
    names = graph_of("tiny-sd").names[1:]
    assert [name for name in names if sum(name in line for line in lines) != 1] == []
    assert max(map(len, lines)) <= width


def test_drawing_of_a_wide_terminal_shows_skips_shares_and_reads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SD-1.5's last block reads the first one's output; its reuse cuts off all the others."""
    line = next(li for li in shown(SD15, 120, "block", monkeypatch) if "up_blocks.3" in li)
    assert "●───────╯" in line and "1, 8" in line and "24.6%" in line and "100.0%" in line


@pytest.mark.parametrize(
    ("model_id", "name", "reads"),
    [
        ("tiny-dit", "transformer_blocks.7.ff", "all before"),
        (
            "stabilityai/stable-diffusion-3-medium-diffusers",
            "transformer_blocks.20.ff_context",
            "all attn, ff_context; 61",
        ),
        ("tiny-sd", "up_blocks.0.resnets.0", "inputs, 17, 20"),
    ],
)
def test_reads_of_many_blocks_are_told_by_kind(model_id: str, name: str, reads: str) -> None:
    graph = graph_of(model_id, "layer")
    assert reads_text(graph, graph.names.index(name)) == reads


def test_show_json_is_the_graph_with_gamma(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models", "show", "tiny-sd", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    graph = graph_of("tiny-sd")
    assert [block["gamma"]["all"] for block in document["blocks"]] == list(graph.savings("all"))
    assert [tuple(block["reads"]) for block in document["blocks"]] == list(graph.producers)
    known = find_known("tiny-sd")
    assert known is not None and document["cache_bytes"] == known.cache_bytes


def test_show_of_an_unknown_model_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models", "show", "tiny-sdd") == 2
    assert "Did you mean 'tiny-sd'?" in capsys.readouterr().err


def test_drawing_as_svg_is_xml_with_a_dot_a_block(tmp_path: Path) -> None:
    path = tmp_path / "graph.svg"
    assert call("models", "show", "tiny-sd", "--output", str(path)) == 0
    circles = ElementTree.parse(path).getroot().findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == graph_of("tiny-sd").num_blocks


def test_drawing_of_another_format_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("models", "show", "tiny-sd", "--output", "graph.png") == 2
    assert "only .svg" in capsys.readouterr().err
