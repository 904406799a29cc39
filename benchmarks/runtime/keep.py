"""Keep matrices of the benchmark, as SubNet files: published gates, and seeded mixed ones.

    python benchmarks/runtime/keep.py released.json

writes them anew; the argument holds the gates that the authors of DiP-GO published for SD-1.5.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Final

import numpy as np
from full_width import Bench, Size, dit, sd15, sdxl

from dipgo_core.binding import subnet_of
from dipgo_core.gates import GateTable
from dipgo_core.graph import BlockGraph
from dipgo_core.pipelines import block_graph
from dipgo_core.postprocess import select_subnet
from dipgo_core.subnet import SubNet

HERE: Final = Path(__file__).resolve().parent
CALLS: Final = 20
MOST_ALL_OR_NOTHING: Final = 0.2
#: Of each model: how it is built, the pixels its MACs are counted at, the targets.
MIXED: Final[dict[str, tuple[Callable[..., Bench], int, tuple[float, ...]]]] = {
    "sd15": (sd15, 512, (0.3, 0.5, 0.7)),
    "sdxl": (sdxl, 1024, (0.5,)),
    "dit": (dit, 256, (0.5,)),
}


def keep_file(name: str) -> SubNet:
    """Return a keep matrix such as ``sd15-mixed-0.3``."""
    return SubNet.load(HERE / f"{name}.json")


def mixed_gates(graph: BlockGraph, target: float, num_calls: int = CALLS) -> GateTable:
    """Draw a table at `target` whose calls are seldom all or nothing: of the first seed that fits.

    Every gate gets a random score, those that would skip a whole call a better one than all others.
    """
    for seed in count():
        scores = np.random.default_rng(seed).random((num_calls, graph.num_blocks))
        scores[:, list({0, graph.skip_gate})] += 1
        gates = graph.close(select_subnet(scores / 2, graph, target))
        if gates.all_or_nothing_share <= MOST_ALL_OR_NOTHING:
            return gates
    raise AssertionError("count() ended")


def write_mixed(name: str) -> None:
    """Write the mixed tables of one model, at its own resolution."""
    build, side, targets = MIXED[name]
    bench = build(Size(side=side, filled=False), CALLS)
    graph = block_graph(bench.model)
    for target in targets:
        source = "drawn at random by benchmarks/runtime/keep.py"
        _write(bench, graph, mixed_gates(graph, target), f"{name}-mixed-{target}", source)


def write_released(published: Path) -> None:
    """Write the gates of DiP-GO's authors, who have none for the denoiser itself."""
    found = json.loads(published.read_text(encoding="utf-8"))
    bench = sd15(Size(side=512, filled=False), len(found["keep"]))
    graph = block_graph(bench.model)
    order = [found["blocks"].index(name) for name in graph.names[1:]]
    rows = ["1" + "".join(row[n] for n in order) for row in found["keep"]]
    _write(bench, graph, GateTable.from_strings(rows), "sd15-released-0.8", found["source"])
    assert keep_file("sd15-released-0.8").sampler["timesteps"] == found["timesteps"]


def _write(bench: Bench, graph: BlockGraph, gates: GateTable, name: str, source: str) -> None:
    subnet_of(bench.model, graph, bench.sampler, gates, source=source).save(HERE / f"{name}.json")


if __name__ == "__main__":
    for one in MIXED:
        write_mixed(one)
    if len(sys.argv) > 1:
        write_released(Path(sys.argv[1]))
