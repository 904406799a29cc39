"""Sampling: the rollout is the stock pipeline's, differentiable; schedulers and their refusals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import diffusers
import pytest
import torch
from tiny import (
    DDIM,
    tiny_dit,
    tiny_model,
    tiny_scheduler,
    tiny_sd,
    tiny_text_config,
    tiny_tokenizer,
    tiny_unet,
    tiny_vae,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dipgo_core.captured import captured_inputs
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import ConfigError, SamplingError
from dipgo_core.families import FAMILIES, num_calls
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.sampling import (
    Batch,
    call_arguments,
    decode,
    rollout,
    set_sampler,
)

ITEMS = (Item("a red cat", 3), Item("the moon", 5))
SEEDS = (11, 12)


@pytest.fixture(scope="module")
def sd() -> LoadedModel:
    return tiny_model(tiny_sd())


@pytest.fixture(scope="module")
def dit() -> LoadedModel:
    return tiny_model(tiny_dit())


def stock(model: LoadedModel, sampler: SamplerSettings, output_type: str = "pt") -> Tensor:
    """The stock pipeline call with a generator an image."""
    if model.family.conditioning == "prompt":
        first: Any = [item.prompt for item in ITEMS]
    else:
        first = [item.label for item in ITEMS]
    output = model.pipe(
        first,
        guidance_scale=sampler.guidance_scale,
        num_inference_steps=sampler.steps,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type=output_type,
    )
    return torch.as_tensor(output.images)


def ours(model: LoadedModel, sampler: SamplerSettings) -> Tensor:
    return rollout(model, Batch(ITEMS, SEEDS), sampler)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make, name)
        for make, family in ((tiny_sd, "sd"), (tiny_dit, "dit"))
        for name in FAMILIES[family].schedulers
    ],
)
def test_rollout_equals_the_stock_pipeline(make: Any, name: str, scale: float) -> None:
    model = tiny_model(make())
    sampler = SamplerSettings(scheduler=name, steps=4, guidance_scale=scale)
    set_sampler(model, sampler)
    expected = stock(model, sampler)
    assert torch.equal(decode(model, ours(model, sampler)), expected)


def test_rollout_gives_what_the_decoder_is_given(sd: LoadedModel) -> None:
    """Oracle: the stock call's own latents, by the factor the autoencoder divides them by."""
    set_sampler(sd, DDIM)
    expected = stock(sd, DDIM, "latent") / sd.pipe.vae.config.scaling_factor
    assert torch.equal(ours(sd, DDIM), expected)


def test_rollout_repeats_itself_and_leaves_the_pipeline_as_it_was(sd: LoadedModel) -> None:
    before = {name: dict(vars(part)) for name, part in sd.pipe.components.items() if part}
    del before["scheduler"]  # the sampler's own is installed
    assert torch.equal(ours(sd, DDIM), ours(sd, DDIM))
    parts = {name: dict(vars(part)) for name, part in sd.pipe.components.items() if part}
    assert all(parts[name] == held for name, held in before.items())
    assert "encode_prompt" not in vars(sd.pipe)


def test_texts_of_a_batch_are_encoded_once(sd: LoadedModel) -> None:
    calls: list[int] = []
    handle = sd.pipe.text_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    batch = Batch(ITEMS, SEEDS)
    first = rollout(sd, batch, DDIM)
    encoded = len(calls)
    again = rollout(sd, batch, DDIM)
    handle.remove()
    assert encoded == len(calls) > 0
    assert torch.equal(first, again)


def test_a_batch_may_be_run_at_another_guidance(sd: LoadedModel) -> None:
    """Oracle: a batch of its own. Without guidance no empty prompt is encoded."""
    batch = Batch(ITEMS, SEEDS)
    for scale in (1.0, 5.0, 1.0):
        sampler = replace(DDIM, guidance_scale=scale)
        assert torch.equal(rollout(sd, batch, sampler), rollout(sd, Batch(ITEMS, SEEDS), sampler))


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_rollout_and_decode_are_differentiable_in_float64(make: Any) -> None:
    """Oracle: a central difference along one direction, scaling every prediction."""
    model = tiny_model(make().to(torch.float64))
    sampler, batch = replace(DDIM, steps=2), Batch(ITEMS, SEEDS)

    def loss(scale: Tensor) -> Tensor:
        def scaled(module: Any, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (output[0] * scale,)
            return type(output)(sample=output.sample * scale)

        hook = model.denoiser.register_forward_hook(scaled)
        final = rollout(model, batch, sampler)
        hook.remove()
        return decode(model, 0.01 * final).square().mean()

    one = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(one), one)
    step = 1e-5
    with torch.no_grad():
        expected = (loss(one + step) - loss(one - step)) / (2 * step)
    assert gradient.dtype == torch.float64
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-4) and gradient != 0


@pytest.mark.parametrize("name", ["ddim", "heun", "pndm"])
def test_rollout_tells_the_number_of_every_call(sd: LoadedModel, name: str) -> None:
    seen: list[int] = []
    sampler = SamplerSettings(scheduler=name, steps=3, guidance_scale=1.0)
    rollout(sd, Batch(ITEMS, SEEDS), sampler, on_call=seen.append)
    assert seen == list(range(num_calls(name, 3)))


def test_rollout_needs_a_seed_an_item() -> None:
    with pytest.raises(SamplingError, match="one seed, got 2 and 1"):
        Batch(ITEMS, (1,))


def test_captured_inputs_are_what_the_denoiser_would_be_given(sd: LoadedModel) -> None:
    """Oracle: a forward hook of torch on the same call."""
    set_sampler(sd, DDIM)
    arguments = call_arguments(sd, ITEMS, SEEDS, DDIM)
    captured = captured_inputs(sd.pipe, "unet", arguments)
    seen: list[Any] = []
    hook = sd.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    sd.pipe(**call_arguments(sd, ITEMS, SEEDS, DDIM))
    hook.remove()
    (sample, timestep), rest = seen[0]
    assert torch.equal(captured["sample"], sample) and captured["timestep"] == timestep
    assert torch.equal(captured["encoder_hidden_states"], rest["encoder_hidden_states"])


def test_set_sampler_returns_the_schedulers_timesteps(sd: LoadedModel) -> None:
    """Oracle: SD-1.5's leading DDIM timesteps, published beside the released gates."""
    assert set_sampler(sd, replace(DDIM, steps=50)) == list(range(981, 0, -20))
    assert type(sd.pipe.scheduler) is diffusers.DDIMScheduler


def test_set_sampler_forgets_the_spacing_of_the_sampler_before(sd: LoadedModel) -> None:
    own = set_sampler(sd, replace(DDIM, steps=4))
    assert set_sampler(sd, replace(DDIM, steps=4, spacing="trailing")) == [999, 749, 499, 249]
    assert set_sampler(sd, replace(DDIM, steps=4)) == own == [751, 501, 251, 1]


def test_set_sampler_refuses_impossible_settings(sd: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="steps 1001 is impossible with ddim"):
        set_sampler(sd, replace(DDIM, steps=1001))
    with pytest.raises(ConfigError, match="61 is impossible with ddim and trailing spacing"):
        set_sampler(sd, replace(DDIM, steps=61, spacing="trailing"))
    with pytest.raises(ConfigError, match="sampler.scheduler knows ddim"):
        set_sampler(sd, replace(DDIM, scheduler="plms"))


def test_labels_are_needed_by_models_conditioned_on_labels(dit: LoadedModel) -> None:
    with pytest.raises(SamplingError, match="'a cat' has none"):
        rollout(dit, Batch((Item("a dog", 1), Item("a cat")), SEEDS), DDIM)


def test_decode_upcasts_where_the_autoencoder_asks_for_it() -> None:
    model = tiny_model(tiny_sd().to(torch.float16))
    assert model.pipe.vae.config.force_upcast
    latents = torch.ones(1, 4, 8, 8, dtype=torch.float16, requires_grad=True)
    images = decode(model, latents)
    images.sum().backward()
    assert images.dtype == torch.float32
    assert latents.grad is not None
    assert model.pipe.vae.dtype == torch.float16


def test_statistics_of_the_latents_are_the_pipelines_affair() -> None:
    """Oracle: SDXL's stock call, whose autoencoder has means and deviations."""
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    pipe = tiny_sdxl()
    pipe.vae = tiny_vae(**statistics)
    model = tiny_model(pipe)
    set_sampler(model, DDIM)
    assert torch.equal(decode(model, ours(model, DDIM)), stock(model, DDIM))


# SDXL ------------------------------------------------------------------------------


def test_rollout_of_sdxl_equals_the_stock_pipeline() -> None:
    pipe = tiny_sdxl()
    model = tiny_model(pipe)
    sampler = replace(DDIM, steps=2)
    set_sampler(model, sampler)
    assert torch.equal(decode(model, ours(model, sampler)), stock(model, sampler))
    graph = block_graph(model)
    assert graph.producers[0] == (graph.num_blocks - 1,)


def tiny_sdxl() -> Any:
    tokenizer = tiny_tokenizer()
    unet = tiny_unet(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    torch.manual_seed(4)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=CLIPTextModel(tiny_text_config(tokenizer)),
        text_encoder_2=CLIPTextModelWithProjection(tiny_text_config(tokenizer)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=tiny_scheduler(),
        add_watermarker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
