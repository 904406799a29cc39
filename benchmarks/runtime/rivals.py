"""Other people's caches on the same schedule: the DeepCache package, and diffusers' own on FLUX."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from full_width import FLUX_ON_CPU, Bench, flux, sd15
from torch import nn
from turns import Ready, Row, applied, loop_times, row_of, size_of

from dipgo_core.baselines import deepcache_gates
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import block_graph


def has_deepcache() -> bool:
    """Say whether the package of the extra `bench` is installed."""
    return find_spec("DeepCache") is not None


def deepcache(options: argparse.Namespace) -> Iterator[Row]:
    """Compare our gates with the DeepCache package on its own schedules."""
    calls = options.steps or 10
    bench = sd15(size_of(options), calls)
    graph = block_graph(bench.model, "layer")
    for interval, branch in ((5, 0), (3, 2)):
        theirs = partial(_deepcache_enabled, bench, interval, branch)
        ours = applied(bench, graph, deepcache_gates(graph, calls, interval, branch), options)
        _check_same_work(bench, theirs, ours)
        times = loop_times(bench, {"theirs": theirs, "ours": ours}, options)
        yield row_of(
            times["theirs"] / times["ours"],
            figure="DeepCache's schedule: time of its package ÷ ours",
            case=f"sd15, one call in {interval} whole, branch {branch}",
            calls=calls,
            goal=1.0,
        )


@contextmanager
def _deepcache_enabled(bench: Bench, interval: int, branch: int) -> Iterator[None]:
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=bench.model.pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=branch)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()


def flux_caches(options: argparse.Namespace) -> Iterator[Row]:
    """Compare our gates with diffusers' own caches, which are made to skip the same blocks."""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    calls = options.steps or 10
    bench = flux(size_of(options), calls, FLUX_ON_CPU if options.device == "cpu" else {})
    graph = block_graph(bench.model)
    heads = np.arange(graph.num_blocks) == 0
    first = heads | (np.arange(graph.num_blocks) == 1)
    every_fourth = np.arange(calls) % 4 == 0
    cases: dict[str, tuple[Any, GateTable]] = {
        "FirstBlockCache, the first block alone after call 0": (
            FirstBlockCacheConfig(threshold=1e9),
            GateTable(first | (np.arange(calls) == 0)[:, None]),
        ),
        "MagCache, every 4th call whole, else no block": (
            MagCacheConfig(
                threshold=1e9,
                max_skip_steps=3,
                retention_ratio=0.0,
                num_inference_steps=calls,
                mag_ratios=[1.0] * calls,
            ),
            GateTable(heads | every_fourth[:, None]),
        ),
    }
    for name, (config, gates) in cases.items():
        theirs, ours = partial(_cache_enabled, bench, config), applied(bench, graph, gates, options)
        _check_same_work(bench, theirs, ours)
        times = loop_times(bench, {"theirs": theirs, "ours": ours}, options)
        yield row_of(
            times["theirs"] / times["ours"],
            figure="FLUX, diffusers' own caches at equal skipped blocks: their time ÷ ours",
            case=name,
            calls=calls,
            goal=1.0,
        )


@contextmanager
def _cache_enabled(bench: Bench, config: Any) -> Iterator[None]:
    denoiser: Any = bench.denoiser
    denoiser.enable_cache(config)
    try:
        yield
    finally:
        denoiser.disable_cache()


def _check_same_work(bench: Bench, theirs: Ready, ours: Ready) -> None:
    """Raise unless both run the same layers equally often and end at the same latents."""
    found = [_executed(bench, ready) for ready in (theirs, ours)]
    (work, latents), (our_work, our_latents) = found
    if work != our_work:
        raise SystemExit(f"not the same work: {work - our_work} / {our_work - work}")
    spread = float((latents.float() - our_latents.float()).abs().max() / latents.float().std())
    if not spread < 0.05:  # half precision rounds in another order
        raise SystemExit(f"the same work, but latents differ by {spread:.2g} of their deviation")


def _executed(bench: Bench, ready: Ready) -> tuple[Counter[str], torch.Tensor]:
    work: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., None]:
        return lambda *_: work.update([name])

    hooks = [
        module.register_forward_pre_hook(counting(name))
        for name, module in bench.denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    ]
    try:
        with ready():
            return work, bench.call()
    finally:
        for hook in hooks:
            hook.remove()
