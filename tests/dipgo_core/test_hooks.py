"""Hooks: what a policy sees, and that removing them leaves no trace."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from dipgo_core.errors import SubNetError, TraceError
from dipgo_core.graph import Block, BlockGraph, Reuse
from dipgo_core.hooks import install, is_hooked
from dipgo_core.structures import Tensors

SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "tuple": lambda x: (x, (x + 1, None)),
    "dict": lambda x: {"sample": x, "kind": "noise"},
    "output": lambda x: Transformer2DModelOutput(sample=x),
    "none": lambda x: None,
}


class Doubler(nn.Module):
    def __init__(self, shape: str) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, hidden_states: Tensor, scale: float = 2.0) -> Any:
        return SHAPES[self.shape](hidden_states * scale)


class Net(nn.Module):
    def __init__(self, shape: str = "tensor") -> None:
        super().__init__()
        self.block = Doubler(shape)

    def forward(self, sample: Tensor, return_dict: bool = True) -> Any:
        out = self.block(hidden_states=sample, scale=3.0)
        return {"sample": out} if return_dict else (out,)


def graph(reuse: Reuse = Reuse.RESIDUAL) -> BlockGraph:
    streams = ("hidden_states",) if reuse is Reuse.RESIDUAL else ()
    blocks = (Block("", Reuse.SKIP, 0, 0), Block("block", reuse, 1, 1, streams))
    return BlockGraph("Net", "block", blocks, ((1,), (-1,)))


@dataclass
class Recorder:
    """Computes everything, or replays what it recorded."""

    replay: bool = False
    seen: Tensors = ()
    prediction: Tensors = ()
    outputs: Tensors = ()

    def denoiser(self, sample: Tensor, timestep: Any, compute: Callable[[], Tensors]) -> Tensors:
        if not self.replay:
            self.prediction = compute()
        return self.prediction

    def block(self, index: int, streams: Tensors, compute: Callable[[], Tensors]) -> Tensors:
        self.seen = streams
        self.outputs = compute()
        return self.outputs


def same(one: Any, two: Any) -> bool:
    return type(one) is type(two) and str(one) == str(two)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("return_dict", [True, False])
def test_computing_and_replaying_equal_the_plain_module(shape: str, return_dict: bool) -> None:
    net, x, policy = Net(shape), torch.arange(3.0), Recorder()
    expected = net(x, return_dict=return_dict)
    handle = install(net, graph(), policy)
    computed = net(sample=x, return_dict=return_dict)
    policy.replay = True
    replayed = net(x, return_dict=return_dict)
    handle.remove()
    assert same(computed, expected)
    assert same(replayed, expected)


def test_policy_sees_flat_tensors_and_residual_streams() -> None:
    net, x, policy = Net("tuple"), torch.ones(2), Recorder()
    install(net, graph(), policy)
    net(x)
    assert policy.seen == (x,)
    assert [t is None for t in policy.outputs] == [False, False, True]


def test_output_blocks_have_no_streams() -> None:
    net, policy = Net(), Recorder()
    install(net, graph(Reuse.OUTPUT), policy)
    net(torch.ones(2))
    assert policy.seen == ()


def test_skipped_denoiser_is_never_entered() -> None:
    net, policy = Net(), Recorder(replay=True, prediction=(torch.zeros(2),))
    install(net, graph(), policy)
    with pytest.raises(SubNetError, match="skipped before it was ever computed"):
        net(torch.ones(2))
    assert policy.seen == ()


def test_remove_deletes_what_install_added() -> None:
    net = Net()
    before = [dict(module.__dict__) for module in net.modules()]
    handle = install(net, graph(), Recorder())
    assert is_hooked(net)
    handle.remove()
    handle.remove()
    assert [dict(module.__dict__) for module in net.modules()] == before
    assert not is_hooked(net)


def wrapped(module: nn.Module) -> Callable[..., Any]:
    original = module.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
    return forward


def test_remove_restores_a_wrapper_that_was_there_before() -> None:
    net = Net()
    theirs = wrapped(net.block)
    install(net, graph(), Recorder()).remove()
    assert net.block.forward is theirs


def test_remove_leaves_a_later_wrapper_and_becomes_inert() -> None:
    net, policy = Net(), Recorder()
    handle = install(net, graph(), policy)
    theirs = wrapped(net.block)
    handle.remove()
    net(torch.ones(2))
    assert net.block.forward is theirs
    assert policy.seen == ()


def test_signature_stays_visible() -> None:
    net = Net()
    expected = inspect.signature(net.forward)
    install(net, graph(), Recorder())
    assert inspect.signature(net.forward) == expected


def test_install_twice_is_refused() -> None:
    net = Net()
    install(net, graph(), Recorder())
    with pytest.raises(SubNetError, match="installed already"):
        install(net, graph(), Recorder())


def test_install_names_a_block_the_denoiser_lacks() -> None:
    with pytest.raises(TraceError, match="no block 'block'"):
        install(nn.Linear(1, 1), graph(), Recorder())


def test_rebuild_refuses_another_number_of_tensors() -> None:
    net, policy = Net(), Recorder()
    handle = install(net, graph(), policy)
    net(torch.ones(2))
    policy.replay, policy.prediction = True, ()
    with pytest.raises(TraceError, match="0 tensors where the module returns 1"):
        net(torch.ones(2))
    handle.remove()
