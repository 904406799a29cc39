"""apply_subnet in the pipelines people build around one denoiser, against naive runs."""

from __future__ import annotations

import copy
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import accelerate
import accelerate.hooks
import diffusers
import numpy as np
import pytest
import torch
from naive import naive_run
from peft import LoraConfig
from tiny import DDIM, tiny_model, tiny_sd
from torch import Tensor, nn

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.runtime import apply_subnet
from dipgo_core.sampling import set_sampler
from dipgo_core.subnet import SubNet
from dipgo_core.zoo import shrunk

ROWS = ["1" * 10, "1111000001", "0" * 10, "1110000011", "1" * 10, "0" * 10]
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(5))
MASK = (IMAGE[:, :1] > 0.5).float()


@pytest.fixture
def sd() -> LoadedModel:
    model = tiny_model(tiny_sd())
    set_sampler(model, DDIM)
    return model


def mixed(model: LoadedModel, sampler: SamplerSettings = DDIM) -> SubNet:
    calls = len(set_sampler(model, sampler))
    rows = (ROWS * 2)[:calls]
    return subnet_of(model, block_graph(model), sampler, GateTable.from_strings(rows))


def run(pipe: Any, seeds: tuple[int, ...] = (1, 2), **arguments: Any) -> Tensor:
    arguments = {
        "num_inference_steps": DDIM.steps,
        "guidance_scale": 4.0,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "latent",
        **arguments,
    }
    return torch.as_tensor(pipe(["a red cat", "the moon", "a dog"][: len(seeds)], **arguments)[0])


def around(cls: Any, model: LoadedModel, **more: Any) -> Any:
    """Another pipeline on the components of a model."""
    names = [n for n in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")]
    components = {name: getattr(model.pipe, name) for name in names}
    pipe = cls(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        **more,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pruned_and_naive(
    pipe: Any, model: LoadedModel, subnet: SubNet, *, first: int = 0, **arguments: Any
) -> tuple[Tensor, Tensor]:
    """The same run twice; also checks that it is not the plain one."""
    rows = subnet.gates.to_strings()
    with apply_subnet(pipe, subnet):
        pruned = run(pipe, **arguments)
    with naive_run(pipe, model.denoiser, block_graph(model), rows, first=first):
        naive = run(pipe, **arguments)
    assert not torch.allclose(pruned, run(pipe, **arguments), atol=1e-4)
    return pruned, naive


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How often a module that no hook of ours wraps is executed."""
    counts = [0]

    def count(*_: Any) -> None:
        counts[0] += 1

    handle = module.register_forward_hook(count)
    yield counts
    handle.remove()


# image-to-image and inpainting --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheduler", "strength"),
    [
        ("ddim", 1.0),
        *itertools.product(("ddim", "pndm", "euler", "dpm++2m", "heun"), (0.9, 0.7, 0.5)),
    ],
)
def test_image_to_image_starts_at_its_own_row(
    sd: LoadedModel, scheduler: str, strength: float
) -> None:
    subnet = mixed(sd, replace(DDIM, scheduler=scheduler))
    pipe = around(diffusers.StableDiffusionImg2ImgPipeline, sd)
    done = int(DDIM.steps * strength)
    first = (DDIM.steps - done) * pipe.scheduler.order
    arguments = {"image": IMAGE.expand(2, -1, -1, -1), "strength": strength, "first": first}
    pruned, naive = pruned_and_naive(pipe, sd, subnet, **arguments)
    assert torch.equal(pruned, naive)


@pytest.mark.parametrize("task", ["Img2Img", "Inpaint"])
@pytest.mark.parametrize("strength", [0.9, 0.7])
def test_sdxl_starts_at_its_own_row(task: str, strength: float) -> None:
    """PNDM has its second timestep twice."""
    model = tiny_model(shrunk.build("sdxl"))
    sampler = replace(DDIM, scheduler="pndm")
    set_sampler(model, sampler)
    rows = ["11111111", "11000011", "00000000", "11100011", "00000000", "11111111", "11000011"]
    subnet = subnet_of(model, block_graph(model), sampler, GateTable.from_strings(rows))
    pipe = getattr(diffusers, f"StableDiffusionXL{task}Pipeline").from_pipe(model.pipe)
    pipe.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {"image": IMAGE.expand(2, -1, -1, -1), "strength": strength}
    if task == "Inpaint":
        arguments |= {"mask_image": MASK.expand(2, -1, -1, -1), "height": 16, "width": 16}
    first = DDIM.steps - int(DDIM.steps * strength)
    pruned, naive = pruned_and_naive(pipe, model, subnet, first=first, **arguments)
    assert torch.equal(pruned, naive)


@pytest.mark.parametrize("channels", [4, 9])
def test_inpainting(channels: int) -> None:
    model = tiny_model(tiny_sd(in_channels=channels))
    pipe = around(diffusers.StableDiffusionInpaintPipeline, model)
    arguments = {"image": IMAGE, "mask_image": MASK, "height": 16, "width": 16}
    pruned, naive = pruned_and_naive(pipe, model, mixed(model), **arguments)
    assert torch.equal(pruned, naive)


# adapters -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_loaded_before_or_after(sd: LoadedModel, when: str) -> None:
    subnet, plain = mixed(sd), run(sd.pipe)
    config = LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights="gaussian")
    if when == "before":
        add_lora(sd, config)
    handle = apply_subnet(sd.pipe, subnet)
    if when == "after":
        run(sd.pipe)
        add_lora(sd, config)
    pruned = run(sd.pipe)
    handle.remove()
    with naive_run(sd.pipe, sd.denoiser, block_graph(sd), subnet.gates.to_strings()):
        assert torch.equal(pruned, run(sd.pipe))
    assert not torch.allclose(run(sd.pipe), plain, atol=1e-3)
    sd.denoiser.delete_adapters("default")  # type: ignore[operator]
    assert torch.equal(run(sd.pipe), plain)


def add_lora(model: LoadedModel, config: LoraConfig) -> None:
    torch.manual_seed(0)
    model.denoiser.add_adapter(config)  # type: ignore[operator]
    for name, parameter in model.denoiser.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)))


def control_pipe(model: LoadedModel) -> Any:
    """A ControlNet of the denoiser, whose zero convolutions are not zero."""
    control = diffusers.ControlNetModel.from_unet(model.denoiser, conditioning_channels=3)
    control.controlnet_cond_embedding = Small()
    generator = torch.Generator().manual_seed(4)
    for parameter in control.parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return around(diffusers.StableDiffusionControlNetPipeline, model, controlnet=control.eval())


class Small(nn.Module):
    """The image of what controls, at the size of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        return torch.as_tensor(self.conv(image))


@pytest.mark.parametrize("guess_mode", [False, True])
def test_controlnet_runs_when_the_denoiser_does(sd: LoadedModel, guess_mode: bool) -> None:
    pipe = control_pipe(sd)
    arguments = {"image": IMAGE.expand(2, -1, -1, -1), "guess_mode": guess_mode}
    pruned, naive = pruned_and_naive(pipe, sd, mixed(sd), **arguments)
    assert torch.equal(pruned, naive)
    with (
        counted(pipe.controlnet) as entered,
        counted(pipe.controlnet.conv_in) as computed,
        apply_subnet(pipe, mixed(sd)),
    ):
        run(pipe, **arguments)
    assert (entered[0], computed[0]) == (6, 4)


def test_guidance_that_ends_while_a_controlnet_guesses_is_refused(sd: LoadedModel) -> None:
    """It would have been left out of a call that must be computed after all."""
    pipe = control_pipe(sd)
    arguments = {
        "image": IMAGE.expand(2, -1, -1, -1),
        "guess_mode": True,
        "callback_on_step_end": guidance_ends_after(1),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    with apply_subnet(pipe, mixed(sd)), pytest.raises(SubNetError, match="guess_mode off"):
        run(pipe, **arguments)


def test_a_run_that_an_error_ended_is_forgotten(sd: LoadedModel) -> None:
    pipe = control_pipe(sd)
    runs: list[weakref.ref[Any]] = []

    def leave(*_: Any) -> Any:
        runs.append(weakref.ref(handle._current()))
        raise KeyboardInterrupt

    with apply_subnet(pipe, mixed(sd)) as handle:
        with pytest.raises(KeyboardInterrupt):
            run(pipe, image=IMAGE.expand(2, -1, -1, -1), callback_on_step_end=leave)
        gc.collect()
        assert runs[0]() is None


def test_t2i_adapters_may_write_to_what_dead_blocks_return(sd: LoadedModel) -> None:
    adapter = diffusers.T2IAdapter(
        in_channels=3, channels=[16, 16, 32, 32], num_res_blocks=1, downscale_factor=2
    )
    pipe = around(diffusers.StableDiffusionAdapterPipeline, sd, adapter=adapter.eval())
    arguments = {"image": IMAGE.expand(2, -1, -1, -1), "height": 16, "width": 16}
    pruned, naive = pruned_and_naive(pipe, sd, mixed(sd), **arguments)
    assert torch.allclose(pruned, naive, atol=1e-5)


# guidance, batches, sizes -------------------------------------------------------------------------


def guidance_ends_after(step: int) -> Callable[..., dict[str, Any]]:
    def callback(pipe: Any, done: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if done == step:
            pipe._guidance_scale = 1.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[-1]
        return given

    return callback


@pytest.mark.parametrize("step", [1, 2])
def test_guidance_may_end_in_mid_run(sd: LoadedModel, step: int) -> None:
    arguments = {
        "callback_on_step_end": guidance_ends_after(step),
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    }
    pruned, naive = pruned_and_naive(sd.pipe, sd, mixed(sd), **arguments)
    assert torch.equal(pruned, naive)


def test_guidance_of_sdxl_may_end_in_mid_run() -> None:
    pipe = shrunk.build("sdxl")
    model = tiny_model(pipe)
    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]

    def callback(pipe: Any, done: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        if done == 1:
            pipe._guidance_scale = 1.0
            given |= {name: given[name].chunk(2)[-1] for name in names}
        return given

    graph = block_graph(model)
    rows = ["11111111", "11000011", "00000000", "11100011", "00000000", "11111111"]
    subnet = subnet_of(model, graph, DDIM, GateTable.from_strings(rows))
    set_sampler(model, DDIM)
    arguments = {
        "height": 64,
        "width": 64,
        "callback_on_step_end": callback,
        "callback_on_step_end_tensor_inputs": ["latents", *names],
    }
    pruned, naive = pruned_and_naive(pipe, model, subnet, **arguments)
    assert torch.equal(pruned, naive)


def test_runs_of_other_batches_sizes_and_guidance_follow_each_other(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    runs: list[dict[str, Any]] = [
        {"seeds": (1,)},
        {"seeds": (1, 2, 3), "guidance_scale": 1.0},
        {"height": 32, "width": 16},
        {"seeds": (4, 5, 6), "height": 16, "width": 32},
        {"seeds": (1,)},
    ]
    with apply_subnet(sd.pipe, subnet):
        pruned = [run(sd.pipe, **arguments) for arguments in runs]
    for found, arguments in zip(pruned, runs, strict=True):
        with naive_run(sd.pipe, sd.denoiser, block_graph(sd), subnet.gates.to_strings()):
            assert torch.equal(found, run(sd.pipe, **arguments))


def test_a_run_after_one_that_was_left_early_is_right(sd: LoadedModel) -> None:
    def leave(pipe: Any, done: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = done >= 1
        return given

    with apply_subnet(sd.pipe, mixed(sd)):
        expected = run(sd.pipe)
        run(sd.pipe, callback_on_step_end=leave)
        with pytest.raises(ZeroDivisionError):
            run(sd.pipe, callback_on_step_end=lambda *_: 1 / 0)
        assert torch.equal(run(sd.pipe), expected)


# shared parts -------------------------------------------------------------------------------------


def test_gates_are_armed_only_for_the_pipeline_they_were_applied_to(sd: LoadedModel) -> None:
    subnet, plain = mixed(sd), run(sd.pipe)
    other = diffusers.StableDiffusionPipeline.from_pipe(sd.pipe)
    other.set_progress_bar_config(disable=True)
    assert other.unet is sd.pipe.unet and other.scheduler is sd.pipe.scheduler
    with apply_subnet(sd.pipe, subnet):
        twin = type(sd.pipe)(**sd.pipe.components, requires_safety_checker=False)
        twin.set_progress_bar_config(disable=True)
        pruned = run(sd.pipe)
        assert torch.equal(run(other), plain)
        assert torch.equal(run(twin), plain)
        assert torch.equal(run(sd.pipe), pruned)
    assert not torch.equal(pruned, plain)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_pipelines_on_one_denoiser_run_a_subnet_each(
    sd: LoadedModel, order: tuple[int, int]
) -> None:
    pipes = [sd.pipe, diffusers.StableDiffusionPipeline.from_pipe(sd.pipe)]
    pipes[1].set_progress_bar_config(disable=True)
    before = [dict(vars(module)) for module in sd.denoiser.modules()]
    subnets = [mixed(sd), replace(mixed(sd), gates=GateTable.from_calls([0, 3], 6, 10))]
    alone = []
    for pipe, subnet in zip(pipes, subnets, strict=True):
        with apply_subnet(pipe, subnet):
            alone.append(run(pipe))
    scheduler = copy.deepcopy(vars(sd.pipe.scheduler))
    handles = [apply_subnet(pipe, subnet) for pipe, subnet in zip(pipes, subnets, strict=True)]
    for pipe, expected in zip(pipes, alone, strict=True):
        assert torch.equal(run(pipe), expected)
    for index in order:
        handles[index].remove()
    assert [dict(vars(module)) for module in sd.denoiser.modules()] == before
    assert set(vars(sd.pipe.scheduler)) == set(scheduler)
    assert [type(pipe).__mro__[0] for pipe in pipes] == [diffusers.StableDiffusionPipeline] * 2


def test_threads_share_a_denoiser(sd: LoadedModel) -> None:
    """Two pipelines that enter the denoiser in turn, each with gates of its own."""
    subnets = [mixed(sd), replace(mixed(sd), gates=GateTable.from_calls([0, 2, 3], 6, 10))]
    pipes = [around(diffusers.StableDiffusionPipeline, sd) for _ in subnets]
    for pipe in pipes:
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    together: dict[int, Tensor] = {}
    turns = threading.Barrier(2, timeout=60)

    def meet(pipe: Any, done: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        turns.wait()
        return given

    def work(index: int) -> None:
        together[index] = run(pipes[index], callback_on_step_end=meet)

    handles = [apply_subnet(pipe, subnet) for pipe, subnet in zip(pipes, subnets, strict=True)]
    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, pipe in enumerate(pipes):
        assert torch.equal(run(pipe), together[index])
        handles[index].remove()


# offloading, precision, layout --------------------------------------------------------------------


def offload(pipe: Any) -> Any:
    """What enable_model_cpu_offload does to a component, with the CPU as the device."""
    _, hook = accelerate.cpu_offload_with_hook(pipe.unet, torch.device("cpu"))
    return hook


def offload_again(pipe: Any) -> None:
    """What a pipeline with offloading does at the end of each of its calls."""
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    offload(pipe)


@pytest.mark.parametrize("when", ["before", "after"])
def test_offloading_before_or_after(sd: LoadedModel, when: str) -> None:
    subnet = mixed(sd)
    with apply_subnet(sd.pipe, subnet):
        expected = run(sd.pipe)
    if when == "before":
        offload(sd.pipe)
    handle = apply_subnet(sd.pipe, subnet)
    if when == "after":
        offload(sd.pipe)
    for _ in range(3):
        assert torch.equal(run(sd.pipe), expected)
        offload_again(sd.pipe)
    handle.remove()
    accelerate.hooks.remove_hook_from_module(sd.pipe.unet, recurse=True)
    vars(sd.pipe.unet).pop("forward", None)  # accelerate puts the bound method back
    assert not any("forward" in vars(module) for module in sd.denoiser.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_precision_may_change_after_applying(sd: LoadedModel, dtype: torch.dtype) -> None:
    subnet = mixed(sd)
    with apply_subnet(sd.pipe, subnet):
        run(sd.pipe)
        sd.pipe.to(dtype)
        pruned = run(sd.pipe)
    assert pruned.dtype == dtype
    with naive_run(sd.pipe, sd.denoiser, block_graph(sd), subnet.gates.to_strings()):
        assert torch.equal(pruned, run(sd.pipe))


def test_channels_last(sd: LoadedModel) -> None:
    sd.denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pruned, naive = pruned_and_naive(sd.pipe, sd, mixed(sd))
    assert torch.allclose(pruned, naive, atol=1e-5)


def test_a_replaced_denoiser_is_refused_at_the_next_call(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    with apply_subnet(sd.pipe, subnet):
        sd.pipe.unet = copy.deepcopy(tiny_sd().unet)
        with pytest.raises(SubNetMismatchError, match=r"pipe\.unet was replaced"):
            run(sd.pipe)


def test_a_replaced_block_is_hooked_again(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    fresh = tiny_sd().unet
    with apply_subnet(sd.pipe, subnet):
        expected = run(sd.pipe)
        sd.denoiser.mid_block = fresh.mid_block
        with counted(fresh.mid_block.resnets[0]) as counts:
            assert torch.equal(run(sd.pipe), expected)
    assert counts[0] == int(np.sum(subnet.gates.keep[:, 5]))
    assert "forward" not in vars(fresh.mid_block)
