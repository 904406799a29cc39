"""Images from seeds: the stock pipeline's, whatever the batch; broken ones are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import DDIM, tiny_dit, tiny_model, tiny_sd

from dipgo_core.errors import EvaluationError, SamplingError
from dipgo_core.evaluation.generate import generate, to_uint8
from dipgo_core.evaluation.protocol import image_seed
from dipgo_core.gates import GateTable
from dipgo_core.hooks import is_hooked
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.sampling import call_arguments, decode, set_sampler

ITEMS = [Item(text, i) for i, text in enumerate(["a red cat", "the moon", "a dog", "blue", "on"])]
SEEDS = [image_seed(0, "test", i) for i in range(5)]


@pytest.fixture(scope="module", params=[tiny_sd, tiny_dit], ids=["sd", "dit"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    return tiny_model(request.param())


def images_of(model: LoadedModel, batch_size: int, **arguments: object) -> torch.Tensor:
    batches = generate(model, ITEMS, SEEDS, DDIM, batch_size=batch_size, **arguments)
    return torch.cat([batch.images for batch in batches])


def test_images_are_the_stock_pipelines(model: LoadedModel) -> None:
    set_sampler(model, DDIM)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    condition = (
        {"prompt": [item.prompt for item in ITEMS]}
        if model.family.conditioning == "prompt"
        else {"class_labels": [item.label for item in ITEMS]}
    )
    expected = model.pipe(
        **condition, generator=generators, num_inference_steps=6, guidance_scale=4.0
    ).images

    images = images_of(model, 5)

    assert np.array_equal(images.permute(0, 2, 3, 1), np.stack([np.asarray(i) for i in expected]))


@pytest.mark.parametrize("gated", [False, True])
def test_images_do_not_depend_on_the_batch(model: LoadedModel, gated: bool) -> None:
    graph = block_graph(model)
    gates = GateTable.from_calls([0, 3], 6, graph.num_blocks) if gated else None

    one, two = (images_of(model, size, gates=gates, graph=graph) for size in (2, 5))

    assert (one.int() - two.int()).abs().max() <= 1  # one grey level: rounding of 1e-5


@pytest.mark.parametrize("gated", [False, True])
def test_latents_of_any_batch_agree_within_1e_5(model: LoadedModel, gated: bool) -> None:
    graph = block_graph(model)
    gates = GateTable.from_calls([0, 3], 6, graph.num_blocks) if gated else None

    def latents(size: int) -> torch.Tensor:
        batches = generate(model, ITEMS, SEEDS, DDIM, gates=gates, graph=graph, batch_size=size)
        return torch.cat([batch.latents for batch in batches])

    together = latents(5)
    for size in (1, 2):
        assert (latents(size) - together).abs().max() <= 1e-5 * together.abs().max()


def test_latents_are_those_the_images_were_decoded_from(model: LoadedModel) -> None:
    (batch,) = generate(model, ITEMS, SEEDS, DDIM)

    with torch.no_grad():
        decoded = decode(model, batch.latents) * 255

    assert batch.latents.shape == (5, 4, 8, 8)
    assert (decoded - batch.images).abs().max() <= 0.5 + 1e-3


def test_noise_is_bit_equal_whatever_the_batch(model: LoadedModel) -> None:
    def first_latents(size: int) -> torch.Tensor:
        set_sampler(model, DDIM)
        seen = []
        for start in range(0, 5, size):
            part = slice(start, start + size)
            arguments = call_arguments(model, ITEMS[part], SEEDS[part], DDIM)
            noise = [torch.randn(1, 4, 8, 8, generator=g) for g in arguments["generator"]]
            seen.append(torch.cat(noise))
        return torch.cat(seen)

    assert torch.equal(first_latents(1), first_latents(3))


def test_all_keep_equals_dense_bit_for_bit(model: LoadedModel) -> None:
    graph = block_graph(model)

    gated = images_of(model, 5, gates=GateTable.all_keep(6, graph.num_blocks), graph=graph)

    assert torch.equal(gated, images_of(model, 5))
    assert not is_hooked(model.denoiser)


def test_forwards_count_batches_and_leave_skipped_calls_out(model: LoadedModel) -> None:
    graph = block_graph(model)
    gates = GateTable.from_calls([0, 2, 4], 6, graph.num_blocks)

    dense = [batch.forwards for batch in generate(model, ITEMS, SEEDS, DDIM, batch_size=3)]
    pruned = [
        batch.forwards
        for batch in generate(model, ITEMS, SEEDS, DDIM, gates=gates, graph=graph, batch_size=3)
    ]

    assert (dense, pruned) == ([6, 6], [3, 3])


def test_model_is_free_between_batches(model: LoadedModel) -> None:
    graph = block_graph(model)
    gates = GateTable.from_calls([0], 6, graph.num_blocks)

    for batch in generate(model, ITEMS, SEEDS, DDIM, gates=gates, graph=graph, batch_size=2):
        assert not is_hooked(model.denoiser), batch.start


def test_few_steps_and_no_guidance_are_honoured(model: LoadedModel) -> None:
    sampler = replace(DDIM, steps=2, guidance_scale=1.0, spacing="trailing")

    batches = list(generate(model, ITEMS[:2], SEEDS[:2], sampler))

    assert batches[0].forwards == 2
    assert batches[0].images.shape == (2, 3, 16, 16)


def test_label_models_need_labels() -> None:
    with pytest.raises(SamplingError, match="conditioned on class labels, but 'a cat' has none"):
        next(generate(tiny_model(tiny_dit()), [Item("a cat")], [1], DDIM))


def test_broken_images_are_named() -> None:
    pixels = torch.full((4, 3, 8, 8), 0.5)
    pixels[1, 0, 0, 0] = float("nan")
    with pytest.raises(EvaluationError, match=r"1 of 4 images are not finite \(image 11\)"):
        to_uint8(pixels, first_index=10)
    pixels[1] = pixels[3] = 0.0
    with pytest.raises(EvaluationError, match=r"2 of 4 images are all black \(image 1, 3\)"):
        to_uint8(pixels)


def test_nan_weights_are_found_at_the_first_batch() -> None:
    model = tiny_model(tiny_sd())
    model.pipe.vae.decoder.conv_out.bias.data.fill_(float("nan"))

    with pytest.raises(EvaluationError, match="not finite"):
        next(generate(model, ITEMS, SEEDS, DDIM))


def test_gates_without_graph_and_unequal_seeds_are_refused(model: LoadedModel) -> None:
    with pytest.raises(EvaluationError, match="need the block graph"):
        next(generate(model, ITEMS, SEEDS, DDIM, gates=GateTable.all_keep(6, 3)))
    with pytest.raises(EvaluationError, match="got 5 and 1"):
        next(generate(model, ITEMS, SEEDS[:1], DDIM))
