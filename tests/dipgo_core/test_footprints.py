"""Live bytes, and the sizes of known models against a trace and against real searches."""

from __future__ import annotations

import gc
import importlib.util
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from tiny import tiny_model, tiny_sd, tiny_unet
from torch import nn

from dipgo_core.config import ModelSettings, SamplerSettings, SearchSettings
from dipgo_core.decoding import Decoding, set_decoding
from dipgo_core.families import KNOWN_MODELS, find_family, find_known
from dipgo_core.families.sizes import CallSizes, DecodeSizes, ModelSizes, known_sizes
from dipgo_core.footprints import LiveBytes, call_bytes, decode_bytes, denoiser_rows
from dipgo_core.items import Item
from dipgo_core.memory import Load, Run, Search, search_need
from dipgo_core.pipelines import LoadedModel, block_graph, load_model
from dipgo_core.search import SearchProblem
from dipgo_core.search.dipgo import search_gates

SD15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
GUIDED = SamplerSettings(scheduler="ddim", steps=4, guidance_scale=3.0)


def test_live_bytes_count_storages_from_start_to_end() -> None:
    before = torch.ones(1000)
    with LiveBytes() as live:
        one = torch.ones(250_000)  # 1 MB
        view, other = one[:10], before + 1
        assert (live.live, view.shape, other.shape) == (1_004_000, (10,), (1000,))
        del one, view
        gc.collect()
        assert (live.live, live.peak) == (4000, 1_004_000)


def test_live_bytes_count_what_autograd_saves() -> None:
    """Oracle: exp saves its output alone, which the result of the sum does not hold."""
    values = torch.ones(1000, requires_grad=True)
    with LiveBytes() as live:
        total = values.exp().sum()
        assert live.live == 4004
        total.backward()
    assert live.live == 4004  # the gradient and the sum


@pytest.fixture(scope="module")
def script(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "model_sizes", repository / "scripts" / "model_sizes.py"
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_known_model_has_sizes() -> None:
    assert list(known_sizes()) == [known.id for known in KNOWN_MODELS]


def numbers(sizes: ModelSizes) -> dict[str, int]:
    leaves = torch.utils._pytree.tree_flatten_with_path(asdict(sizes))[0]
    return {str(path): int(value) for path, value in leaves if not isinstance(value, str)}


def check_trace(script: ModuleType, model_id: str) -> None:
    """Other versions of the libraries may hold a little more or less."""
    known = find_known(model_id)
    assert known is not None
    counted = ModelSizes.from_json(script.sizes_of(known))
    assert numbers(counted) == pytest.approx(numbers(known_sizes()[model_id]), rel=0.03)


@pytest.mark.parametrize("model_id", ["tiny-sd", "tiny-dit"])
def test_sizes_are_what_a_trace_counts(script: ModuleType, model_id: str) -> None:
    check_trace(script, model_id)


#: A U-Net and a transformer; the others take minutes, and their sizes are written by the script.
TRACED = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "facebook/DiT-XL-2-256")


@pytest.mark.slow
@pytest.mark.parametrize("model_id", TRACED)
def test_sizes_of_full_models_are_what_a_trace_counts(script: ModuleType, model_id: str) -> None:
    check_trace(script, model_id)


def test_parameters_of_sd_15_are_the_published_ones() -> None:
    """Oracle: 860 M, 123 M and 84 M, as its model card and papers have them."""
    sizes = known_sizes()[SD15]
    assert (sizes.denoiser, sizes.text, sizes.decoder) == (859_520_964, 123_060_480, 83_653_863)


# the estimate against searches that really run ----------------------------------------------------


def parameters(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def problem_of(model: LoadedModel, sampler: SamplerSettings, **how: Any) -> SearchProblem:
    return SearchProblem(
        model=model,
        graph=block_graph(model),
        sampler=sampler,
        settings=SearchSettings(steps=2, warmup_steps=0, batch_size=2, query_dim=16),
        items=(Item("a red cat", 1), Item("a blue dog", 2)),
        seeds=(0, 1),
        **how,
    )


def measured(problem: SearchProblem) -> int:
    """Return the most bytes that one search step holds, with the pipeline's weights."""
    steps = search_gates(problem)
    with LiveBytes() as live:
        next(steps)
    steps.close()
    networks = [c for c in problem.model.pipe.components.values() if isinstance(c, nn.Module)]
    return live.peak + 4 * parameters(*networks)


def estimated(problem: SearchProblem, sizes: ModelSizes, decoding: Decoding) -> int:
    """Return the estimate without its margin."""
    settings, images = problem.settings, problem.images_at_once or problem.settings.batch_size
    search = Search(
        images=settings.batch_size,
        calls=problem.sampler.steps,
        granularity="block",
        gates=len(problem.graph.searched),
        query_dim=settings.query_dim,
    )
    run = Run(images=images, checkpoint_calls=problem.checkpoint_calls, decoding=decoding)
    load = Load(sizes=sizes, dtype="float32", side=problem.model.resolution, guided=True)
    return sum(search_need(load, search, run).parts.values())


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-dit"])
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_estimate_of_a_search_is_near_what_it_holds(name: str, again: bool) -> None:
    problem = problem_of(load_model(ModelSettings(id=name)), GUIDED, checkpoint_calls=again)
    ratio = estimated(problem, known_sizes()[name], Decoding()) / measured(problem)
    assert 0.8 < ratio < 1.3


def test_estimate_follows_every_way_to_take_less() -> None:
    problem = problem_of(
        load_model(ModelSettings(id="tiny-sd")), GUIDED, checkpoint_calls=True, images_at_once=1
    )
    decoding = Decoding(checkpointing=True)
    set_decoding(problem.model.decoder, decoding)
    ratio = estimated(problem, known_sizes()["tiny-sd"], decoding) / measured(problem)
    assert 0.8 < ratio < 1.3


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["kept", "computed again"])
def test_estimate_of_a_search_where_activations_outweigh_weights(again: bool) -> None:
    """A U-Net of 13 M parameters at 64 pixels: traced without weights, and then run."""
    config = {
        "sample_size": 32,
        "block_out_channels": (64, 128, 128, 128),
        "layers_per_block": 2,
        "attention_head_dim": 4,
    }
    model = tiny_model(tiny_sd(**config))
    problem = problem_of(model, GUIDED, checkpoint_calls=again)
    ratio = estimated(problem, traced(model, config), Decoding()) / measured(problem)
    assert 0.8 < ratio < 1.3


def traced(model: LoadedModel, config: dict[str, Any]) -> ModelSizes:
    """Return the sizes of a Stable Diffusion pipeline in memory, each network traced alone."""
    pipe, rows = model.pipe, 2
    family, full = find_family("sd"), dict(pipe.unet.config)
    inputs = lambda: denoiser_rows(family, full, pipe.tokenizer.model_max_length, rows)  # noqa: E731
    call = call_bytes(lambda: tiny_unet(**config), block_graph(model), inputs, torch.float16)
    vae = {k: v for k, v in pipe.vae.config.items() if not k.startswith("_")}
    latents = (1, 4, model.latent_side, model.latent_side)
    decode = decode_bytes(lambda: diffusers.AutoencoderKL(**vae), latents, torch.float32)
    return ModelSizes(
        denoiser=parameters(pipe.unet),
        text=parameters(pipe.text_encoder),
        decoder=parameters(pipe.vae),
        side=model.resolution,
        calls={"block": CallSizes(**{name: size // rows for name, size in call.items()})},
        decode=DecodeSizes(**decode),
    )


def test_rows_are_copies_of_the_one_a_family_describes() -> None:
    family, known = find_family("flux"), find_known("black-forest-labs/FLUX.1-dev")
    assert known is not None
    with torch.device("meta"):
        config = dict(diffusers.FluxTransformer2DModel(num_layers=1, num_single_layers=1).config)
    rows = denoiser_rows(family, config, known.tokens, 3)
    assert rows["hidden_states"].shape[0] == 3
    assert rows["img_ids"].shape[0] == 4096  # positions have no rows


def test_sizes_survive_json() -> None:
    sizes = known_sizes()["tiny-sd"]
    assert ModelSizes.from_json(asdict(sizes)) == sizes
