"""GatedCalls: which blocks run, what is cached and for how long, what dead blocks return."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.gated import GatedCalls, GatePlan
from dipgo_core.gates import GateTable
from dipgo_core.graph import Block, BlockGraph, Reuse
from dipgo_core.repeat import Repeat
from dipgo_core.structures import Tensors

SAMPLE = torch.zeros(1, 4)


def chain(reuse: Reuse = Reuse.OUTPUT) -> BlockGraph:
    """input -> 1 -> 2 -> 3 -> output, which also reads the input and, when outputs, block 1."""
    streams = ("x",) if reuse is Reuse.RESIDUAL else ()
    blocks = [Block(f"b{n}", reuse, 1, 1, streams) for n in (1, 2, 3)]
    output = (-1, 3) if reuse is Reuse.RESIDUAL else (-1, 1, 3)
    return BlockGraph(
        "Chain", "block", (Block("", Reuse.SKIP, 0, 0), *blocks), (output, (-1,), (1,), (2,))
    )


def gated(rows: list[str], reuse: Reuse = Reuse.OUTPUT, **options: Any) -> GatedCalls:
    plan = GatePlan.of(chain(reuse), GateTable.from_strings(rows))
    return GatedCalls(plan, lambda: Repeat(None), **options)


def forward(
    calls: GatedCalls, sample: Tensor = SAMPLE, make: Callable[[int], Tensors] | None = None
) -> tuple[list[int], list[Tensors]]:
    """One forward of the denoiser: which blocks ran, and what each returned."""
    ran: list[int] = []
    outputs: list[Tensors] = []

    def compute(index: int) -> Tensors:
        ran.append(index)
        return make(index) if make else (sample + index,)

    def denoiser() -> Tensors:
        ran.append(0)
        for index in (1, 2, 3):
            outputs.append(calls.block(index, (sample,), lambda index=index: compute(index)))  # type: ignore[misc]
        return (sample + 10,)

    outputs.append(calls.denoiser(sample, 5, denoiser))
    return ran, outputs


def run(calls: GatedCalls, count: int) -> list[list[int]]:
    ran = []
    for call in range(count):
        calls.start_call(call)
        ran.append(forward(calls)[0])
    return ran


def test_live_blocks_run_and_no_others() -> None:
    rows = ["1111", "1101", "0000", "1010", "1001", "1000"]
    assert run(gated(rows), 6) == [[0, 1, 2, 3], [0, 1, 3], [], [0], [0, 3], [0]]
    residual = [[0, 1, 2, 3], [0, 1, 3], [], [0, 2], [0, 3], [0]]
    assert run(gated(rows, Reuse.RESIDUAL), 6) == residual


def test_a_late_start_is_whole_and_keeps_what_follows() -> None:
    calls = gated(["1111", "1111", "1001", "1001"], first_call=lambda timestep: 2)
    assert forward(calls)[0] == [0, 1, 2, 3]
    calls.advance()
    assert forward(calls)[0] == [0, 3]


def test_first_call_gets_the_timestep() -> None:
    seen: list[Any] = []
    forward(gated(["1111"], first_call=lambda timestep: seen.append(timestep) or 0))  # type: ignore[func-returns-value]
    assert seen == [5]


def test_cached_tensors_are_freed_after_their_last_use() -> None:
    """Oracle: weak references to what blocks returned or left, without a garbage collector."""
    calls = gated(["1111", "1001", "1011", "1111", "1111"], Reuse.RESIDUAL)
    alive: list[list[int]] = []
    changes: dict[int, Any] = {}
    gc.disable()
    for call in range(5):
        calls.start_call(call)
        forward(calls)
        changes |= {
            index: weakref.ref(tensors[0]) for index, tensors in calls._place.cached.items()
        }
        alive.append(sorted(index for index, ref in changes.items() if ref() is not None))
    gc.enable()
    assert alive == [[1, 2], [1], [], [], []]
    assert calls.peak_cache_bytes == 2 * SAMPLE.numel() * 4


def test_dead_blocks_return_one_element_seen_everywhere() -> None:
    calls = gated(["1111", "1110", "1001"])
    big = torch.ones(8, 8)
    calls.start_call(0)
    forward(calls, make=lambda index: (big, None))
    calls.start_call(1)
    _, outputs = forward(calls)
    dead = outputs[1][0]
    assert dead is not None and outputs[1][1] is None
    assert dead.shape == big.shape and dead.untyped_storage().nbytes() == 4


def test_roomy_dead_blocks_may_be_written_to() -> None:
    calls = gated(["1111", "1110"], roomy=True)
    run(calls, 1)
    calls.start_call(1)
    dead = forward(calls)[1][1][0]
    assert dead is not None
    dead += 1


def test_a_tensor_that_is_returned_twice_is_cached_once() -> None:
    calls = gated(["1111", "1001", "1001"])
    calls.start_call(0)
    state = torch.ones(4)
    forward(calls, make=lambda index: (state, state) if index == 2 else (SAMPLE,))
    assert calls.peak_cache_bytes == state.numel() * 4 + SAMPLE.numel() * 4
    calls.start_call(1)
    again = forward(calls)[1][1]
    assert again[0] is again[1] and again[0] is not state


def test_the_last_reader_gets_the_cached_tensor_itself() -> None:
    calls = gated(["1111", "1001", "1001"])
    run(calls, 1)
    cached = calls._place.cached[2][0]
    calls.start_call(1)
    assert forward(calls)[1][1][0] is not cached
    calls.start_call(2)
    assert forward(calls)[1][1][0] is cached


@pytest.mark.parametrize(
    "sample", [torch.zeros(2, 4), torch.zeros(1, 4, dtype=torch.float64), torch.zeros(1, 5)]
)
def test_another_kind_of_sample_is_computed_whole(sample: Tensor) -> None:
    calls = gated(["1111", "0000", "1001"])
    run(calls, 1)
    calls.start_call(1)
    assert forward(calls, sample)[0] == [0, 1, 2, 3]
    calls.start_call(2)
    assert forward(calls, sample)[0] == [0, 3]


def test_a_forward_left_out_of_a_call_is_computed_whole_afterwards() -> None:
    """Guidance by a second forward a step, off for one step."""
    calls = gated(["1111", "1001", "1001", "1001"])
    ran = []
    for call, forwards in enumerate((2, 2, 1, 2)):
        calls.start_call(call)
        ran.append([len(forward(calls)[0]) for _ in range(forwards)])
    assert ran == [[4, 4], [2, 2], [2], [2, 4]]


def test_a_forward_left_out_of_a_call_keeps_no_caches() -> None:
    """Oracle: two blocks cached a forward, of four float32 each."""
    calls = gated(["1111", "1001", "1001", "1001"], Reuse.RESIDUAL)
    cached: list[Any] = []
    for call, forwards in enumerate((2, 1, 1)):
        calls.start_call(call)
        for _ in range(forwards):
            forward(calls)
            cached.append(weakref.ref(calls._place.cached[1][0]))
    assert cached[1]() is None
    assert calls._held == 2 * SAMPLE.numel() * 4


def test_restarting_forgets_everything() -> None:
    calls = gated(["1111", "1001"])
    run(calls, 1)
    calls.restart()
    assert forward(calls)[0] == [0, 1, 2, 3]


def test_one_call_too_many_is_refused() -> None:
    calls = gated(["1111"])
    calls.start_call(1)
    with pytest.raises(SubNetMismatchError, match="has 1 calls"):
        forward(calls)


def test_a_block_that_did_not_run_cannot_be_reused() -> None:
    calls = gated(["1111", "1001"])
    calls.start_call(0)
    calls.denoiser(SAMPLE, 0, lambda: (SAMPLE,))
    calls.start_call(1)
    with pytest.raises(SubNetError, match="'b1' is to be reused, but this pipeline did not run it"):
        forward(calls)


def test_spares_tells_a_skip_before_it_happens() -> None:
    calls = gated(["1111", "0000", "1111"])
    told = []
    for call in range(3):
        calls.start_call(call)
        told.append(calls.spares())
        forward(calls)
    assert told == [False, True, False]


def test_a_spared_call_cannot_be_computed_after_all() -> None:
    calls = gated(["1111", "0000"])
    run(calls, 1)
    calls.start_call(1)
    assert calls.spares()
    with pytest.raises(SubNetError, match="ControlNet had been left out"):
        forward(calls, torch.zeros(2, 4))


def on_stream(
    calls: GatedCalls, between: float = 0.0, blocks: tuple[int, ...] = (1, 2, 3)
) -> Tensor:
    """One forward whose blocks add their number to a stream; something else may add in between."""

    def denoiser() -> Tensors:
        stream = SAMPLE
        for index in blocks:
            before = stream
            out = calls.block(index, (before,), lambda i=index, b=before: (b + i,))  # type: ignore[misc]
            assert out[0] is not None
            stream = out[0] + between if between and index == 2 else out[0]
        return (stream,)

    (output,) = calls.denoiser(SAMPLE, 5, denoiser)
    assert output is not None
    return output


def test_blocks_reused_together_are_cached_as_one_change() -> None:
    """Oracle: 1 + 2 + 3, whichever of them are reused; block 3 is reused longer than the others."""
    calls = gated(["1111", "1001", "1110", "1000"], Reuse.RESIDUAL)
    held = []
    for call in range(4):
        calls.start_call(call)
        assert torch.equal(on_stream(calls), SAMPLE + 6)
        held.append({n: bool(tensors) for n, tensors in calls._place.cached.items()})
    assert held == [{1: True, 2: False}, {3: True}, {1: True, 2: False, 3: True}, {}]
    assert calls.peak_cache_bytes == 2 * SAMPLE.numel() * 4


def test_what_is_added_between_blocks_is_not_cached_with_them() -> None:
    """Oracle: blocks add 6, a ControlNet 10 between blocks 2 and 3, then 20."""
    calls = gated(["1111", "1000"], Reuse.RESIDUAL)
    calls.start_call(0)
    assert torch.equal(on_stream(calls, between=10.0), SAMPLE + 16)
    calls.start_call(1)
    assert torch.equal(on_stream(calls, between=20.0), SAMPLE + 26)


@pytest.mark.parametrize("blocks", [(2, 3), (1, 3), (1, 2), (1,), (3,)])
@pytest.mark.parametrize("row", ["1000", "1001", "1100"])
def test_blocks_that_a_pipeline_leaves_out_are_not_cached(
    row: str, blocks: tuple[int, ...]
) -> None:
    """SD3's guidance by skipped layers, at either end of a chain and inside; oracle: their sum."""
    calls = gated(["1111", row], Reuse.RESIDUAL)
    for call in (0, 1):
        calls.start_call(call)
        assert torch.equal(on_stream(calls, blocks=blocks), SAMPLE + sum(blocks))


def test_calls_that_compute_all_and_keep_nothing_leave_blocks_alone() -> None:
    """The first call of the first table shows what its dead block 2 will have to look like."""
    alone = []
    for rows in (["1111", "1111", "1110"], ["1111", "1101", "1111", "1111"]):
        calls = gated(rows)
        for call in range(len(rows)):
            calls.start_call(call)
            forward(calls)
            alone.append(calls.leaves_blocks_alone)
    assert alone == [False, False, False, False, False, True, True]
