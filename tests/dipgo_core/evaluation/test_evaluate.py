"""A whole evaluation: shards of any size give the same figures; what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import DDIM, tiny_model, tiny_sd

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation import evaluate
from dipgo_core.evaluation.evaluate import (
    Scorers,
    evaluate_shards,
    generate_images,
    summarise,
)
from dipgo_core.evaluation.fid import load_extractor
from dipgo_core.evaluation.prompts import items_sha256
from dipgo_core.evaluation.protocol import Protocol
from dipgo_core.evaluation.reference import reference_of
from dipgo_core.evaluation.scorers import Scorer
from dipgo_core.evaluation.shards import ShardResult, cut, first_of, merge_shards
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph

ITEMS = tuple(Item(text) for text in ("a red cat", "the moon", "a dog", "blue", "on"))
CLIP = Scorer("fake-clip", "0", "none")


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model(tiny_sd())


@pytest.fixture(scope="module")
def scorers() -> Scorers:
    return {"features": load_extractor("tiny-features"), "clip": SimpleNamespace(scorer=CLIP)}


@pytest.fixture(scope="module")
def protocol(scorers: Scorers) -> Protocol:
    return Protocol(
        split="test",
        items_sha256=items_sha256(ITEMS),
        num_items=5,
        images=10,
        seed=0,
        height=16,
        width=16,
        sampler=DDIM.to_json(),
        dtype="float32",
        scorers={"features": scorers["features"].scorer, "clip": CLIP},
        metrics=("fid", "kid", "clip", "psnr", "ssim"),
        kid_subset_size=5,
    )


@pytest.fixture(autouse=True)
def brightness_as_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in CLIP: mean brightness plus the length of the prompt."""

    def scores(clip: object, images: torch.Tensor, prompts: list[str]) -> np.ndarray:
        lengths = np.array([len(prompt) for prompt in prompts], dtype=float)
        return images.float().mean(dim=(1, 2, 3)).numpy() + lengths

    monkeypatch.setattr(evaluate, "clip_scores", scores)


@pytest.fixture(scope="module")
def dense(model, protocol) -> torch.Tensor:
    return images_of(model, protocol)


def images_of(model, protocol, **arguments) -> torch.Tensor:
    wanted = range(protocol.images)
    batches = generate_images(model, protocol, ITEMS, wanted, sampler=DDIM, **arguments)
    return torch.cat([batch.images for batch in batches])


@pytest.fixture(scope="module")
def gated(model) -> dict[str, object]:
    graph = block_graph(model)
    return {"gates": GateTable.from_calls([0, 2, 4], 6, graph.num_blocks), "graph": graph}


def shards(model, protocol, scorers, dense, gated, shard_size=10, **arguments) -> list[ShardResult]:
    return list(
        evaluate_shards(
            model,
            protocol,
            ITEMS,
            scorers,
            sampler=DDIM,
            dense=lambda start, stop: dense[start:stop],
            shards=cut(range(protocol.images), shard_size),
            **gated,
            **arguments,
        )
    )


def whole(model, protocol, *args, **sizes) -> ShardResult:
    return merge_shards(shards(model, protocol, *args, **sizes), protocol)


def test_figures_do_not_depend_on_shards_and_batches(
    model, protocol, scorers, dense, gated
) -> None:
    features = scorers["features"]
    references = {"features": reference_of(features(dense), features.scorer)}

    small, large = (
        summarise(whole(model, protocol, scorers, dense, gated, **sizes), protocol, references)
        for sizes in ({"shard_size": 4, "batch_size": 3}, {"shard_size": 10, "batch_size": 16})
    )

    assert list(small) == ["fid", "kid", "clip", "psnr", "ssim"]
    for name, figure in small.items():
        assert figure.value == pytest.approx(large[name].value, rel=1e-3, abs=1e-3), name
        assert (figure.n, figure.protocol) == (10, protocol.hash)
    assert small["clip"].scorer == "fake-clip"
    assert small["psnr"].low <= small["psnr"].value <= small["psnr"].high


def test_shard_holds_scores_of_its_own_prompts(model, protocol, scorers, dense, gated) -> None:
    second = shards(model, protocol, scorers, dense, gated, shard_size=4)[1]

    images = images_of(model, protocol, **gated)[4:8].numpy()
    lengths = [len(ITEMS[i % 5].prompt) for i in range(4, 8)]
    assert (second.start, second.stop, second.forwards) == (4, 8, 3)
    brightness = images.mean(axis=(1, 2, 3))
    assert second.scores["clip"] - brightness == pytest.approx(lengths, abs=0.01)
    assert second.features["features"].shape == (4, 64)
    assert np.abs(second.samples.astype(int) - images).max() <= 1  # of the first 8 images


def test_only_the_shards_asked_for_are_computed(model, protocol, scorers, dense, gated) -> None:
    rest = evaluate_shards(
        model,
        protocol,
        ITEMS,
        scorers,
        sampler=DDIM,
        dense=lambda start, stop: dense[start:stop],
        shards=[range(4, 8)],
        **gated,
    )

    assert [(shard.start, shard.stop) for shard in rest] == [(4, 8)]


def test_stored_shards_come_back_whole(model, protocol, scorers, dense, gated) -> None:
    shard = shards(model, protocol, scorers, dense, gated, shard_size=10)[0]

    again = ShardResult.from_tensors(shard.to_tensors())

    assert (again.start, again.stop, again.forwards) == (0, 10, shard.forwards)
    assert again.scores.keys() == {"clip", "psnr", "ssim"}
    assert np.array_equal(again.features["features"], shard.features["features"])
    assert len(again.samples) == 8


def test_dense_run_needs_no_dense_images(model, protocol, scorers) -> None:
    result = list(evaluate_shards(model, protocol, ITEMS, scorers, sampler=DDIM))

    assert result[0].scores.keys() == {"clip"}


def test_merging_finds_missing_and_double_images(protocol) -> None:
    def shard(start: int, stop: int) -> ShardResult:
        return ShardResult(start, stop, {}, {}, np.zeros((0, 3, 1, 1), np.uint8), 0)

    merge_shards([shard(4, 10), shard(0, 4)], protocol)
    for parts, rule in (
        ([shard(0, 4), shard(5, 10)], "images 4 to 4 are missing"),
        ([shard(0, 4), shard(3, 10)], "images 3 to 3 are there twice"),
        ([shard(0, 4)], "images 4 to 9 are missing"),
        ([shard(0, 11)], "images 0 to 10 are there, asked for are 0 to 9"),
    ):
        with pytest.raises(EvaluationError, match=rule):
            merge_shards(parts, protocol)


def test_shards_cover_all_images_once_whatever_they_are_cut_at() -> None:
    for at in ((), (3, 6, 8), (11, 40)):
        assert [i for shard in cut(range(11), 4, at) for i in shard] == list(range(11))
    assert cut(range(11), 4, (6,)) == (range(4), range(4, 6), range(6, 8), range(8, 11))
    assert cut(range(14), 4, (6,))[:3] == cut(range(11), 4, (6,))[:3]


def test_first_images_of_a_shard_are_what_fewer_images_are(
    model, protocol, scorers, dense, gated
) -> None:
    """Oracle: numpy's slices of the whole shard."""
    (whole_shard,) = shards(model, protocol, scorers, dense, gated, shard_size=10)
    part = first_of(whole_shard, replace(protocol, images=6, kid_subset_size=3))

    assert (part.start, part.stop, part.samples.shape[0]) == (0, 6, 6)
    assert part.forwards == whole_shard.forwards * 6 // 10
    assert np.array_equal(part.scores["psnr"], whole_shard.scores["psnr"][:6])
    assert np.array_equal(part.features["features"], whole_shard.features["features"][:6])


def test_what_is_not_the_protocols_is_refused_before_generating(
    model, protocol, scorers, gated
) -> None:
    other_clip = {**scorers, "clip": SimpleNamespace(scorer=replace(CLIP, digest="1"))}
    for items, loaded, gates, rule in (
        (ITEMS[:4], scorers, {}, "the prompt set changed"),
        (ITEMS, {"clip": scorers["clip"]}, {}, "the protocol's features are by"),
        (ITEMS, other_clip, {}, "the protocol's clip are by"),
        (ITEMS, scorers, gated, "psnr and ssim need the dense images"),
    ):
        with pytest.raises(EvaluationError, match=rule):
            next(evaluate_shards(model, protocol, items, loaded, sampler=DDIM, **gates))


def test_image_size_of_another_protocol_is_refused(model, protocol, scorers) -> None:
    larger = replace(protocol, height=32)

    with pytest.raises(EvaluationError, match=r"makes images of \(16, 16\)"):
        next(evaluate_shards(model, larger, ITEMS, scorers, sampler=DDIM))


def test_another_reference_is_refused(model, protocol, scorers, dense, gated) -> None:
    parts = whole(model, protocol, scorers, dense, gated)
    features = scorers["features"](dense)

    with pytest.raises(EvaluationError, match="tiny-features need a reference"):
        summarise(parts, protocol, {})
    for reference in (
        reference_of(features, scorers["features"].scorer, id="folder:x"),
        reference_of(features, CLIP),
    ):
        with pytest.raises(EvaluationError, match="the protocol compares with dense"):
            summarise(parts, protocol, {"features": reference})
