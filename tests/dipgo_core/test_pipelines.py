"""Pipelines: the rollout equals the stock pipeline; loading refuses what it cannot read."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    DDIM,
    tiny_dit,
    tiny_model,
    tiny_scheduler,
    tiny_sd,
    tiny_text_config,
    tiny_tokenizer,
    tiny_transformer,
    tiny_unet,
    tiny_vae,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dipgo_core.blocks import example_inputs
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.errors import ConfigError, ModelFilesError, UnknownModelError
from dipgo_core.families import FAMILIES, NOISE_SCHEDULERS, find_known
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import (
    LoadedModel,
    block_graph,
    deciding_config,
    decode,
    encode,
    initial_latents,
    load_model,
    loaded_model,
    rollout,
    set_sampler,
    subnet_of,
    weights_digest,
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
    latents = initial_latents(model, SEEDS)
    return rollout(model, encode(model, ITEMS, sampler.guidance_scale), latents, sampler)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", NOISE_SCHEDULERS)
def test_rollout_equals_the_stock_pipeline(sd: LoadedModel, name: str, scale: float) -> None:
    sampler = SamplerSettings(scheduler=name, steps=4, guidance_scale=scale)
    set_sampler(sd, sampler)
    latents = ours(sd, sampler)
    assert torch.equal(latents, stock(sd, sampler, "latent"))
    assert torch.equal(decode(sd, latents), stock(sd, sampler))


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["ddim", "dpm++2m"])
def test_rollout_equals_the_stock_dit_pipeline(dit: LoadedModel, name: str, scale: float) -> None:
    sampler = SamplerSettings(scheduler=name, steps=4, guidance_scale=scale)
    set_sampler(dit, sampler)
    images = decode(dit, ours(dit, sampler))
    assert torch.allclose(images, stock(dit, sampler), atol=2e-6)


def test_rollout_leaves_the_pipelines_scheduler_alone(sd: LoadedModel) -> None:
    sampler = replace(DDIM, scheduler="dpm++2m", steps=3)
    set_sampler(sd, sampler)
    before = str(vars(sd.pipe.scheduler))
    first, second = ours(sd, sampler), ours(sd, sampler)
    assert torch.equal(first, second)
    assert str(vars(sd.pipe.scheduler)) == before


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_rollout_and_decode_are_differentiable_in_float64(make: Any) -> None:
    """Oracle: a central difference along one direction."""
    model = tiny_model(make().to(torch.float64))
    sampler = replace(DDIM, steps=2)
    conditioning = encode(model, ITEMS, sampler.guidance_scale)
    latents = 0.1 * initial_latents(model, SEEDS)

    def loss(shift: Tensor) -> Tensor:
        final = rollout(model, conditioning, latents + shift, sampler)
        return decode(model, 0.01 * final).square().mean()

    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(shift), shift)
    step = torch.tensor(1e-5, dtype=torch.float64)
    with torch.no_grad():
        expected = (loss(step) - loss(-step)) / (2 * step)
    assert gradient.dtype == torch.float64
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-4)


def test_rollout_reports_the_latents_before_every_call(sd: LoadedModel) -> None:
    seen: list[tuple[int, Tensor]] = []
    start, sampler = initial_latents(sd, SEEDS), replace(DDIM, steps=3)
    conditioning = encode(sd, ITEMS, 1.0)
    rollout(sd, conditioning, start, sampler, on_call=lambda i, x: seen.append((i, x)))
    assert [call for call, _ in seen] == [0, 1, 2]
    assert torch.equal(seen[0][1], start)


def test_rollout_takes_another_predictor(sd: LoadedModel) -> None:
    timesteps: list[int] = []

    def nothing(call: int, model_input: Tensor, timestep: Tensor) -> Tensor:
        timesteps.append(int(timestep))
        return torch.zeros_like(model_input)

    conditioning = encode(sd, ITEMS, 1.0)
    rollout(sd, conditioning, initial_latents(sd, SEEDS), DDIM, predictor=nothing)
    assert timesteps == set_sampler(sd, DDIM)


@pytest.mark.parametrize("seeds", [(1,), (1, 2), (2, 1, 3)])
def test_noise_of_an_image_does_not_depend_on_its_batch(
    sd: LoadedModel, seeds: Sequence[int]
) -> None:
    batch = initial_latents(sd, seeds)
    for latents, seed in zip(batch, seeds, strict=True):
        assert torch.equal(latents, initial_latents(sd, [seed])[0])


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
    with pytest.raises(ConfigError, match="'a cat' has none"):
        encode(dit, [Item("a dog", 1), Item("a cat")], 1.0)


def test_decode_upcasts_where_the_autoencoder_asks_for_it() -> None:
    model = tiny_model(tiny_sd().to(torch.float16))
    assert model.pipe.vae.config.force_upcast
    latents = torch.ones(1, 4, 8, 8, dtype=torch.float16, requires_grad=True)
    images = decode(model, latents)
    images.sum().backward()
    assert images.dtype == torch.float32
    assert latents.grad is not None
    assert model.pipe.vae.dtype == torch.float16


def test_decode_uses_the_statistics_of_the_latents(sd: LoadedModel) -> None:
    """Oracle: SDXL's formula written out."""
    statistics = {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}
    pipe = tiny_sd()
    pipe.vae = tiny_vae(**statistics)
    latents = torch.ones(1, 4, 8, 8)
    mean, std = (torch.tensor(v).view(1, 4, 1, 1) for v in statistics.values())
    expected = pipe.vae.decode(latents / pipe.vae.config.scaling_factor * std + mean).sample
    assert torch.allclose(decode(tiny_model(pipe), latents), (expected / 2 + 0.5).clamp(0, 1))


# SDXL ------------------------------------------------------------------------------


def test_encode_sdxl_makes_what_the_stock_pipeline_gives_its_denoiser() -> None:
    """Oracle: the arguments the stock call hands to the U-Net."""
    pipe = tiny_sdxl()
    model = loaded_model(pipe, ModelSettings(id="tiny-xl"), weights_sha256="0")
    sampler = replace(DDIM, steps=2)
    set_sampler(model, sampler)
    expected = stock(model, sampler, "latent")
    assert torch.equal(ours(model, sampler), expected)
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


# SubNets of a model ------------------------------------------------------------------------------


def test_subnet_of_closes_the_gates_and_counts_both_conventions(sd: LoadedModel) -> None:
    graph, sampler = block_graph(sd), replace(DDIM, steps=2)
    gates = GateTable.from_strings(["1" * 10, "1111111110"])
    subnet = subnet_of(sd, graph, sampler, gates, seed=7)
    assert subnet.gates.to_strings() == ["1" * 10, "0" * 10]
    assert subnet.macs["dense"] == 2 * graph.call_macs("all") == 2 * subnet.macs["kept"]
    assert subnet.macs["paper"]["kept"] == graph.call_macs("paper")
    assert subnet.sampler["timesteps"] == set_sampler(sd, sampler)
    assert subnet.provenance == {"seed": 7}


def test_deciding_config_leaves_foreign_and_private_fields_out() -> None:
    config = {**tiny_scheduler().config, "skip_prk_steps": True}
    scheduler = diffusers.DDIMScheduler.from_config(config)
    assert "skip_prk_steps" in scheduler.config
    assert deciding_config(scheduler) == deciding_config(tiny_scheduler())
    assert not any(key.startswith("_") for key in deciding_config(tiny_unet()))


def test_example_inputs_are_on_the_meta_device() -> None:
    inputs = example_inputs(tiny_unet().config, FAMILIES["sd"], tokens=8)
    assert {tensor.device.type for tensor in inputs.values()} == {"meta"}
    assert inputs["encoder_hidden_states"].shape == (1, 8, 16)


# loading ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_dit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("make", [tiny_sd, tiny_dit])
def test_load_model_reads_a_saved_pipeline(tmp_path: Path, make: Any) -> None:
    make().save_pretrained(tmp_path)
    model = load_model(ModelSettings(id=str(tmp_path)))
    assert torch.equal(ours(model, DDIM), ours(tiny_model(make()), DDIM))
    assert not model.denoiser.training
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert model.weights_sha256 == weights_digest(model.settings)
    assert getattr(model.pipe, "safety_checker", None) is None


def test_load_model_honours_the_dtype(folder: Path) -> None:
    model = load_model(ModelSettings(id=str(folder), dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert model.device.type == "cpu"


def test_weights_digest_depends_on_contents_only(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("card", "utf-8")
    (copy / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"variant")
    before = weights_digest(ModelSettings(id=str(folder)))
    assert weights_digest(ModelSettings(id=str(copy))) == before
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text("utf-8").replace("0.012", "0.013"), "utf-8")
    assert weights_digest(ModelSettings(id=str(copy))) != before


def test_weights_digest_of_a_hub_id_is_its_revision() -> None:
    settings = ModelSettings(id="owner/name", revision="abc")
    assert weights_digest(settings) == "hub:owner/name@abc"


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", r"lacks transformer/\*\.safetensors"),
        ("vae/config.json", r"lacks vae/\*\.json"),
        ("model_index.json", "not a saved pipeline"),
    ],
)
def test_load_model_names_missing_files(folder: Path, gone: str, message: str) -> None:
    (folder / gone).unlink()
    with pytest.raises(ModelFilesError, match=message):
        load_model(ModelSettings(id=str(folder)))


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("text_encoder/model.safetensors", "final_layer_norm.weight"),
        ("unet/diffusion_pytorch_model.safetensors", "conv_out.weight"),
        ("vae/diffusion_pytorch_model.safetensors", "decoder.conv_out.bias"),
    ],
)
def test_load_model_leaves_no_weight_at_random(tmp_path: Path, file: str, tensor: str) -> None:
    tiny_sd().save_pretrained(tmp_path)
    weights = load_file(tmp_path / file)
    lost = {name for name in weights if name.endswith(tensor)}
    kept = {name: value for name, value in weights.items() if name not in lost}
    save_file(kept, tmp_path / file, metadata={"format": "pt"})
    part = re.escape(file.partition("/")[0])
    with pytest.raises(ModelFilesError, match=rf"{part} lack {len(lost)} tensors.*{tensor}"):
        load_model(ModelSettings(id=str(tmp_path)))


def test_load_model_leaves_no_weight_of_a_shard_empty(folder: Path) -> None:
    tiny_transformer().save_pretrained(folder / "transformer", max_shard_size="20KB")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    shard = sorted((folder / "transformer").glob("*-00001-of-*.safetensors"))[0]
    name, *kept = sorted(load_file(shard).items())
    save_file(dict(kept), shard, metadata={"format": "pt"})
    with pytest.raises(ModelFilesError, match=f"transformer lack 1 tensors .*{name[0]}"):
        load_model(ModelSettings(id=str(folder)))


def test_load_model_reads_no_pickled_weights(folder: Path) -> None:
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelFilesError, match=r"vae/\*\.safetensors.*Only safetensors"):
        load_model(ModelSettings(id=str(folder)))


def test_load_model_says_what_to_do_without_network() -> None:
    with pytest.raises(ModelFilesError, match="HF_HUB_OFFLINE.* name a local folder"):
        load_model(ModelSettings(id="facebook/DiT-XL-2-256"))


def test_load_model_refuses_what_is_neither_folder_nor_id() -> None:
    with pytest.raises(ModelFilesError, match="no bundled model, no folder here and no hub id"):
        load_model(ModelSettings(id="tiny-sdd"))


def test_load_model_refuses_an_unknown_pipeline(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text(index.read_text("utf-8").replace("DiTPipeline", "FluxPipeline"), "utf-8")
    with pytest.raises(UnknownModelError, match="FluxPipeline"):
        load_model(ModelSettings(id=str(folder)))


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-dit"])
def test_bundled_models_load_and_cost_what_planning_says(name: str) -> None:
    model, known = load_model(ModelSettings(id=name)), find_known(name)
    assert known is not None
    graph = block_graph(model)
    assert (graph.call_macs("all"), graph.call_macs("paper")) == (known.macs, known.macs_paper)
    assert model.family.name == known.family
    assert len(set_sampler(model, known.sampler)) == known.sampler.steps
