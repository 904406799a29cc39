"""Estimates and choices: sums by hand, the goals, and in which order memory is saved."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dipgo_core.decoding import Decoding
from dipgo_core.families import find_known
from dipgo_core.families.sizes import CallSizes, DecodeSizes, ModelSizes, known_sizes
from dipgo_core.memory import (
    MARGIN,
    OVERHEAD,
    Load,
    Run,
    Search,
    fit_generation,
    fit_search,
    generation_need,
    search_need,
)

MB, GB = 10**6, 10**9
SIZES = ModelSizes(
    denoiser=1000 * MB,
    text=100 * MB,
    decoder=50 * MB,
    side=512,
    calls={"block": CallSizes(forward=60 * MB, cache=20 * MB, saved=600 * MB, backward=700 * MB)},
    decode=DecodeSizes(
        forward=800 * MB,
        backward=6000 * MB,
        checkpointed=3000 * MB,
        tiled=200 * MB,
        tiled_backward=1500 * MB,
    ),
)
LOAD = Load(sizes=SIZES, dtype="float16", side=512, guided=True)
SEARCH = Search(images=4, calls=50, granularity="block", gates=10, query_dim=512)


def paper(model_id: str, guidance: float = 7.5) -> tuple[Load, Search]:
    """The paper's search: 50 DDIM steps, one image, guidance, float16, everything by default."""
    known = find_known(model_id)
    assert known is not None
    load = Load(
        sizes=known_sizes()[model_id],
        dtype="float16",
        side=known.resolution,
        guided=guidance > 1,
        pipeline_upcasts=known.family == "sdxl",
    )
    gates = known.num_blocks - 1
    return load, Search(images=1, calls=50, granularity="block", gates=gates, query_dim=512)


@pytest.mark.parametrize(
    "model_id, goal",
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 24 * GB),
        ("stabilityai/stable-diffusion-xl-base-1.0", 80 * GB),
    ],
)
def test_a_paper_faithful_search_meets_its_goal(model_id: str, goal: int) -> None:
    load, search = paper(model_id)
    as_it_is = search_need(load, search, Run(images=1))
    assert as_it_is.fits(goal) is True
    assert fit_search(load, search, goal).fits is True


def test_need_of_a_search_is_the_sum_of_its_parts() -> None:
    """Oracle: by hand. Two rows an image; the decoder is there in float16 and float32."""
    parts = search_need(LOAD, SEARCH, Run(images=4, checkpoint_calls=True)).parts
    assert parts["denoiser"] == 2000 * MB and parts["autoencoder"] == 300 * MB
    assert parts["caches between calls"] == 50 * 8 * 20 * MB
    assert parts["activations"] == 4 * 6000 * MB  # decoding, for 8 x 700 MB is less
    kept = search_need(LOAD, SEARCH, Run(images=4, checkpoint_calls=False)).parts
    assert kept["activations of all calls"] == 49 * 8 * 600 * MB


def test_margin_and_overhead_are_added_once() -> None:
    need = generation_need(LOAD, Run(images=1))
    assert need.total == round(sum(need.parts.values()) * MARGIN) + OVERHEAD


def test_wider_types_and_larger_images_take_more() -> None:
    one = generation_need(LOAD, Run(images=1)).parts
    wide = generation_need(replace(LOAD, dtype="float32"), Run(images=1)).parts
    large = generation_need(replace(LOAD, side=1024), Run(images=1)).parts
    assert wide["activations"] == 2 * one["activations"]
    assert large["activations"] == 4 * one["activations"]
    assert large["denoiser"] == one["denoiser"]


def test_caches_and_scorers_count_where_there_are_some() -> None:
    load = replace(LOAD, scorers={"clip": 5 * GB, "mine": None})
    need = generation_need(load, Run(images=3), gated="block")
    assert need.parts["caches"] == 3 * 2 * 20 * MB and need.parts["scorers"] == 5 * GB
    assert need.unknown == ("mine",)


def test_images_are_made_as_asked_where_they_fit_or_nobody_says() -> None:
    for limit in (None, 100 * GB):
        fit = fit_generation(LOAD, 16, limit)
        assert (fit.run, fit.fits) == (Run(images=16), None if limit is None else True)


def test_images_are_decoded_one_by_one_before_there_are_fewer() -> None:
    limits = (12 * GB, 9 * GB, 5 * GB)
    runs = [fit_generation(LOAD, 16, limit).run for limit in limits]
    assert [run.images for run in runs[:2]] == [16, 16]
    assert [run.decoding.slicing for run in runs] == [False, True, True]
    assert 1 <= runs[2].images < 16 and fit_generation(LOAD, 16, 5 * GB).fits


def test_what_decides_the_result_is_never_changed() -> None:
    fit = fit_generation(LOAD, 16, 5 * GB, fixed=True)
    assert (fit.run, fit.fits) == (Run(images=16), False)


def test_a_search_saves_memory_in_the_order_of_its_cost() -> None:
    limits = [400 * GB, 50 * GB, 40 * GB, 17 * GB, 11 * GB]
    runs = [fit_search(LOAD, SEARCH, limit).run for limit in limits]
    seen = [(run.images, run.checkpoint_calls, run.decoding.checkpointing) for run in runs]
    assert seen[0] == (4, False, False)
    assert seen[1:3] == [(4, True, False), (4, True, True)]
    assert seen[3] == (2, True, True) and seen[4] == (1, True, True)


def test_a_search_that_fits_in_no_way_says_what_the_least_takes() -> None:
    fit = fit_search(LOAD, SEARCH, 5 * GB)
    assert fit.fits is False and fit.run.images == 1
    tiled = fit_search(LOAD, SEARCH, 8 * GB, tile=256)
    assert tiled.run.decoding == Decoding(checkpointing=True, tile=256)
    assert tiled.need.total < fit.need.total


def test_nothing_is_guessed_of_unknown_models() -> None:
    """What is known may be too much already; else nobody can say."""
    weights = replace(LOAD, sizes=replace(SIZES, calls={}))
    fit = fit_search(weights, SEARCH, 24 * GB)
    assert fit.fits is None and fit.need.unknown == ("activations",)
    assert fit.run == Run(images=SEARCH.images)  # not even that all activations are kept
    assert fit_search(weights, SEARCH, 2 * GB).fits is False
    assert fit_generation(replace(LOAD, sizes=None), 4, 24 * GB).need.unknown == ("the model",)
