"""apply_subnet: equal to the plain pipeline where it must be, refusing what does not fit."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from naive import naive_run
from tiny import DDIM, tiny_dit, tiny_model, tiny_scheduler, tiny_sd
from torch import Tensor

from dipgo_core.binding import subnet_of
from dipgo_core.config import SamplerSettings
from dipgo_core.errors import SubNetError, SubNetMismatchError
from dipgo_core.gates import GateTable
from dipgo_core.items import Item
from dipgo_core.pipelines import LoadedModel, block_graph
from dipgo_core.runtime import SubNetHandle, apply_subnet, gated_calls
from dipgo_core.sampling import Batch, rollout, set_sampler
from dipgo_core.subnet import SubNet

MIXED = {
    "sd": ["1" * 10, "1111000001", "0" * 10, "1110000011", "1" * 10, "0" * 10],
    "dit": ["1" * 5, "10100", "00000", "10000", "11111", "11011"],
}


@pytest.fixture(scope="module")
def sd() -> LoadedModel:
    return tiny_model(tiny_sd())


@pytest.fixture(scope="module")
def dit() -> LoadedModel:
    return tiny_model(tiny_dit())


@pytest.fixture(params=["sd", "dit"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    loaded: LoadedModel = request.getfixturevalue(request.param)
    set_sampler(loaded, DDIM)
    return loaded


def subnet_for(
    model: LoadedModel, rows: list[str] | None = None, sampler: SamplerSettings = DDIM
) -> SubNet:
    graph = block_graph(model)
    calls = len(set_sampler(model, sampler))
    gates = GateTable.all_keep(calls, graph.num_blocks)
    return subnet_of(model, graph, sampler, GateTable.from_strings(rows) if rows else gates)


def mixed(model: LoadedModel) -> SubNet:
    return subnet_for(model, MIXED[model.family.name])


def images(
    model: LoadedModel, seeds: tuple[int, ...] = (1, 2), scale: float = 4.0, **kwargs: Any
) -> Tensor:
    arguments = {
        "num_inference_steps": DDIM.steps,
        "guidance_scale": scale,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
        **kwargs,
    }
    if model.family.name == "dit":
        return torch.as_tensor(model.pipe(list(seeds), **arguments).images)
    words = ["a red cat", "the moon", "a blue dog"]
    return torch.as_tensor(model.pipe([words[s % 3] for s in seeds], **arguments).images)


# equal to the plain pipeline ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_all_keep_equals_the_plain_pipeline_bit_for_bit(model: LoadedModel, scale: float) -> None:
    plain = images(model, scale=scale)
    with apply_subnet(model.pipe, subnet_for(model)):
        pruned = images(model, scale=scale)
    assert torch.equal(pruned, plain)


@pytest.mark.parametrize("name", ["pndm", "dpm++2m", "euler", "heun", "unipc"])
def test_all_keep_equals_the_plain_pipeline_with_every_scheduler(
    sd: LoadedModel, name: str
) -> None:
    subnet = subnet_for(sd, sampler=replace(DDIM, scheduler=name))
    plain = images(sd)
    with apply_subnet(sd.pipe, subnet):
        assert torch.equal(images(sd), plain)


def test_pruning_changes_the_images(model: LoadedModel) -> None:
    plain = images(model)
    with apply_subnet(model.pipe, mixed(model)):
        assert not torch.allclose(images(model), plain, atol=1e-4)


def test_runs_do_not_depend_on_earlier_runs(model: LoadedModel) -> None:
    """Oracle: each run on a freshly applied SubNet."""
    runs = [((1, 2), 4.0), ((5,), 1.0), ((1, 2, 3), 4.0), ((1, 2), 4.0)]
    alone = []
    for seeds, scale in runs:
        with apply_subnet(model.pipe, mixed(model)):
            alone.append(images(model, seeds, scale))
    with apply_subnet(model.pipe, mixed(model)):
        for (seeds, scale), expected in zip(runs, alone, strict=True):
            assert torch.equal(images(model, seeds, scale), expected)


def test_a_run_after_an_interrupted_one_is_right(sd: LoadedModel) -> None:
    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with apply_subnet(sd.pipe, mixed(sd)):
        expected = images(sd)
        with pytest.raises(KeyboardInterrupt):
            images(sd, (7, 8), callback_on_step_end=interrupt)
        assert torch.equal(images(sd), expected)


def test_gated_rollout_equals_the_applied_subnet(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    with apply_subnet(sd.pipe, subnet):
        expected = images(sd, output_type="latent")
    batch = Batch((Item("the moon"), Item("a blue dog")), (1, 2))
    with torch.no_grad(), gated_calls(sd, block_graph(sd), subnet.gates) as calls:
        latents = rollout(sd, batch, DDIM, on_call=calls.start_call)
    assert torch.equal(latents, expected / sd.pipe.vae.config.scaling_factor)


# what is reused, what is executed ----------------------------------------------------------------


def random_rows(model: LoadedModel, seed: int = 0) -> list[str]:
    """A closed table in which every kind of row is likely."""
    graph, rng = block_graph(model), np.random.default_rng(seed)
    keep = rng.random((DDIM.steps, graph.num_blocks)) < rng.random((DDIM.steps, 1))
    keep[:, 0] |= rng.random(DDIM.steps) < 0.7
    keep[0] = True
    return graph.close(GateTable(keep)).to_strings()


@pytest.mark.parametrize("seed", range(3))
def test_gated_runs_equal_the_naive_ones(model: LoadedModel, seed: int) -> None:
    rows = random_rows(model, seed)
    with apply_subnet(model.pipe, subnet_for(model, rows)):
        pruned = images(model)
    with naive_run(model.pipe, model.denoiser, block_graph(model), rows):
        torch.testing.assert_close(pruned, images(model))  # changes are summed in another order


@contextmanager
def counted(model: LoadedModel, names: list[str]) -> Iterator[dict[str, int]]:
    """How often modules that no hook of ours wraps are executed."""
    counts = dict.fromkeys(names, 0)

    def counter(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            counts[name] += 1

        return count

    modules = [(name, model.denoiser.get_submodule(name)) for name in names]
    handles = [module.register_forward_hook(counter(name)) for name, module in modules]
    yield counts
    for handle in handles:
        handle.remove()


def test_dead_and_reused_blocks_are_not_executed(sd: LoadedModel) -> None:
    """Oracle: row 1 keeps down 0 to 2, but nobody reads down 1 and 2; row 3 reads down 1."""
    parts = ["conv_in", "down_blocks.0.resnets.0", "down_blocks.1.resnets.0"]
    parts += ["mid_block.resnets.0", "up_blocks.3.resnets.0"]
    with apply_subnet(sd.pipe, mixed(sd)), counted(sd, parts) as counts:
        images(sd)
    assert list(counts.values()) == [4, 4, 3, 2, 4]


def test_executed_blocks_are_what_macs_charge(model: LoadedModel) -> None:
    graph, subnet = block_graph(model), mixed(model)
    inner = {"sd": "resnets.0", "dit": "attn1"}[model.family.name]
    names = [f"{name}.{inner}" for name in graph.names[1:]]
    with apply_subnet(model.pipe, subnet), counted(model, names) as counts:
        images(model)
    charged = graph.close(subnet.gates).keep.sum(axis=0)
    assert list(counts.values()) == charged[1:].tolist()


def test_peak_cache_is_what_liveness_requires(model: LoadedModel) -> None:
    """Oracle: the traced sizes; guidance doubles the batch of two."""
    graph, rows = block_graph(model), random_rows(model)
    sizes = [4 * block.elements * 4 for block in graph.blocks]
    with apply_subnet(model.pipe, subnet_for(model, rows)) as handle:
        assert handle.peak_cache_bytes == 0
        images(model)
    assert handle.peak_cache_bytes == graph.peak_cache(GateTable.from_strings(rows), sizes) > 0


def test_all_keep_caches_nothing(model: LoadedModel) -> None:
    with apply_subnet(model.pipe, subnet_for(model)) as handle:
        images(model)
    assert handle.peak_cache_bytes == 0


def test_cached_outputs_survive_in_place_changes(sd: LoadedModel) -> None:
    """FreeU scales a block's output in place inside the next block."""
    sd.pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    rows = ["1" * 10, *["1000000111"] * 5]
    with apply_subnet(sd.pipe, subnet_for(sd, rows)):
        one, two = images(sd), images(sd)
    sd.pipe.disable_freeu()
    assert torch.equal(one, two)
    assert torch.isfinite(one).all()


# pipelines with loops of their own ---------------------------------------------------------------


@torch.no_grad()
def own_loop(handle: SubNetHandle, model: LoadedModel, split: bool, wide_from: int = 99) -> Tensor:
    """Guidance in one doubled or in two single forwards a step; another batch from `wide_from`."""
    positive, negative = model.pipe.encode_prompt(["a red cat"], "cpu", 1, True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    scheduler = model.pipe.scheduler
    with handle.run():
        scheduler.set_timesteps(DDIM.steps)
        for call, t in enumerate(scheduler.timesteps):
            latents = torch.cat([latents, latents]) if call == wide_from else latents
            halves = [states.expand(len(latents), -1, -1) for states in (negative, positive)]
            if split:
                outputs = [model.denoiser(latents, t, half)[0] for half in halves]
            else:
                both = model.denoiser(torch.cat([latents] * 2), t, torch.cat(halves))[0]
                outputs = list(both.chunk(2))
            prediction = outputs[0] + 4.0 * (outputs[1] - outputs[0])
            latents = scheduler.step(prediction, t, latents).prev_sample
    return latents


def test_two_forwards_a_step_have_a_cache_each(sd: LoadedModel) -> None:
    """Oracle: the same SubNet with both halves in one forward."""
    with apply_subnet(sd.pipe, mixed(sd)) as handle:
        apart = own_loop(handle, sd, split=True)
        assert torch.allclose(apart, own_loop(handle, sd, split=False), atol=1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_a_change_of_shape_recomputes_the_step_whole(sd: LoadedModel, split: bool) -> None:
    with apply_subnet(sd.pipe, mixed(sd)) as handle, counted(sd, ["conv_in"]) as counts:
        latents = own_loop(handle, sd, split, wide_from=2)  # call 2 would be skipped
    assert counts["conv_in"] == 5 * (2 if split else 1)
    assert torch.allclose(latents[0], latents[1], atol=1e-5)


def test_more_calls_than_rows_are_refused(sd: LoadedModel) -> None:
    with torch.no_grad(), apply_subnet(sd.pipe, mixed(sd)) as handle, handle.run():
        sd.pipe.scheduler.set_timesteps(DDIM.steps)
        sample, states = torch.zeros(1, 4, 8, 8), torch.zeros(1, 8, 16)
        for timestep in sd.pipe.scheduler.timesteps:
            sd.denoiser(sample, timestep, states)
            sd.pipe.scheduler.step(sample, timestep, sample)
        with pytest.raises(SubNetMismatchError, match="6 calls"):
            sd.denoiser(sample, 1, states)


# the way back ------------------------------------------------------------------------------------


def state(model: LoadedModel) -> list[dict[str, Any]]:
    owners = [*model.denoiser.modules(), model.pipe.scheduler]
    members = [{k: v for k, v in vars(o).items() if callable(v)} for o in owners]
    members[0]["names"] = list(vars(model.denoiser))
    return [*members, {"class": type(model.pipe), "names": list(vars(model.pipe))}]


def test_remove_restores_methods_and_images(model: LoadedModel) -> None:
    subnet = mixed(model)
    plain, before = images(model), state(model)  # calls leave attributes of their own
    handle = apply_subnet(model.pipe, subnet)
    assert state(model) != before
    handle.remove()
    handle.remove()
    assert state(model) == before
    assert torch.equal(images(model), plain)


@pytest.mark.parametrize("build", [tiny_sd, tiny_dit])
def test_copies_of_what_is_hooked_are_plain_and_lead_nowhere_back(
    build: Callable[[], Any],
) -> None:
    """Oracle: the pipeline before it was hooked; a copy keeps the weights of its own."""
    model = tiny_model(build())
    set_sampler(model, DDIM)
    plain = images(model)
    handle = apply_subnet(model.pipe, mixed(model))
    expected = images(model)
    twin = copy.deepcopy(model.pipe)
    assert torch.equal(images(model), expected)
    assert torch.equal(images(replace(model, pipe=twin)), plain)
    for parameter in model.denoiser.parameters():
        parameter.data.zero_()
    assert torch.equal(images(replace(model, pipe=twin)), plain)
    with apply_subnet(twin, mixed(replace(model, pipe=twin))):
        assert torch.equal(images(replace(model, pipe=twin)), expected)
    handle.remove()
    assert torch.equal(images(replace(model, pipe=twin)), plain)


def test_a_shallow_copy_of_an_armed_pipeline_is_plain(sd: LoadedModel) -> None:
    plain = images(sd)
    handle = apply_subnet(sd.pipe, mixed(sd))
    twin = copy.copy(sd.pipe)
    assert torch.equal(images(replace(sd, pipe=twin)), plain)
    handle.remove()
    assert type(twin) is type(sd.pipe)


def test_a_copied_scheduler_sets_its_own_timesteps(sd: LoadedModel) -> None:
    with apply_subnet(sd.pipe, mixed(sd)):
        before = sd.pipe.scheduler.timesteps
        twin = copy.deepcopy(sd.pipe.scheduler)
        twin.set_timesteps(3)
        assert len(twin.timesteps) == 3
        assert sd.pipe.scheduler.timesteps is before


def test_the_decoder_of_float16_is_copied_without_the_watch() -> None:
    """Oracle: the copy's precision; calls of the original's method would be in float16."""
    sd = tiny_model(tiny_sd())
    sd.pipe.vae.to(torch.float16)
    with apply_subnet(sd.pipe, mixed(sd)):
        decoder = sd.decoder
        assert decoder.decode(torch.zeros(1, 4, 8, 8)).sample.dtype == torch.float32


@pytest.mark.parametrize(
    "use", [lambda h: h.run().__enter__(), lambda h: h.compile(), lambda h: h.fuse()]
)
def test_a_removed_handle_hooks_nothing_again(sd: LoadedModel, use: Callable[[Any], Any]) -> None:
    before = state(sd)
    handle = apply_subnet(sd.pipe, mixed(sd))
    handle.remove()
    with apply_subnet(sd.pipe, mixed(sd)), pytest.raises(SubNetError, match="was removed"):
        use(handle)
    with pytest.raises(SubNetError, match="was removed"):
        use(handle)
    assert state(sd) == before


def test_context_manager_removes_after_an_error(sd: LoadedModel) -> None:
    subnet, before = mixed(sd), state(sd)
    with pytest.raises(RuntimeError, match="mine"), apply_subnet(sd.pipe, subnet):
        raise RuntimeError("mine")
    assert state(sd) == before


def test_remove_keeps_a_wrapper_of_the_scheduler(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    original = sd.pipe.scheduler.step
    theirs = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))
    sd.pipe.scheduler.step = theirs
    apply_subnet(sd.pipe, subnet).remove()
    assert sd.pipe.scheduler.step is theirs


def test_signatures_of_the_scheduler_stay_visible(sd: LoadedModel) -> None:
    subnet, scheduler = mixed(sd), sd.pipe.scheduler
    before = [inspect.signature(m) for m in (scheduler.step, scheduler.set_timesteps)]
    with apply_subnet(sd.pipe, subnet):
        after = [inspect.signature(m) for m in (scheduler.step, scheduler.set_timesteps)]
    assert after == before


def test_applying_logs_the_number_of_blocks(
    dit: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    subnet = mixed(dit)
    with caplog.at_level(logging.INFO, "dipgo_core.runtime"), apply_subnet(dit.pipe, subnet) as h:
        assert h.num_blocks == 4
    assert "hooked 4 blocks of DiTTransformer2DModel for 6 calls" in caplog.text


# refusals ----------------------------------------------------------------------------------------


def test_another_number_of_steps_is_refused_with_the_line_that_works(model: LoadedModel) -> None:
    subnet = mixed(model)
    with apply_subnet(model.pipe, subnet), pytest.raises(SubNetMismatchError) as caught:
        images(model, num_inference_steps=7)
    message = str(caught.value)
    assert "6 calls" in message
    assert "has 7" in message
    assert "pipe(..., **subnet.call_kwargs())" in message
    assert "num_inference_steps=6" in message


def test_another_scheduler_is_refused_with_the_line_that_works(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    set_sampler(sd, replace(DDIM, scheduler="dpm++2m"))
    with pytest.raises(SubNetMismatchError, match=r"DDIMScheduler.*DPMSolver.*from_config"):
        apply_subnet(sd.pipe, subnet)
    sd.pipe.scheduler = diffusers.DDIMScheduler.from_config(subnet.sampler["config"])
    apply_subnet(sd.pipe, subnet).remove()


def test_another_scheduler_config_is_refused_naming_the_fields(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    sd.pipe.scheduler = tiny_scheduler(timestep_spacing="trailing", beta_end=0.02)
    with pytest.raises(SubNetMismatchError, match=r"beta_end: 0.012 / 0.02, timestep_spacing"):
        apply_subnet(sd.pipe, subnet)


def test_a_replaced_scheduler_is_noticed_at_the_next_call(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    with apply_subnet(sd.pipe, subnet):
        sd.pipe.scheduler = tiny_scheduler()
        with pytest.raises(SubNetMismatchError, match="replaced after apply_subnet"):
            images(sd)


def test_another_denoiser_config_is_refused_naming_the_fields(sd: LoadedModel) -> None:
    other = tiny_sd(attention_head_dim=4, scheduler=sd.pipe.scheduler)
    with pytest.raises(SubNetMismatchError, match=r"attention_head_dim: 2 / 4"):
        apply_subnet(other, mixed(sd))


def test_another_kind_of_pipeline_is_refused(sd: LoadedModel, dit: LoadedModel) -> None:
    with pytest.raises(SubNetMismatchError, match="UNet2DConditionModel of tiny.*DiTPipeline"):
        apply_subnet(dit.pipe, mixed(sd))


def test_other_block_names_are_refused(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    names = ("", "down_blocks.9", *subnet.block_names[2:])
    set_sampler(sd, DDIM)
    with pytest.raises(SubNetMismatchError, match=r"down_blocks\.9.*down_blocks\.0"):
        apply_subnet(sd.pipe, replace(subnet, block_names=names))


def test_applying_twice_is_refused(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    with apply_subnet(sd.pipe, subnet), pytest.raises(SubNetError, match="applied already"):
        apply_subnet(sd.pipe, subnet)


def test_a_saved_subnet_applies_to_a_fresh_pipeline(sd: LoadedModel, tmp_path: Any) -> None:
    subnet = mixed(sd)
    subnet.save(tmp_path / "subnet.json")
    with apply_subnet(sd.pipe, subnet):
        expected = images(sd)
    fresh, loaded = tiny_model(tiny_sd()), SubNet.load(tmp_path / "subnet.json")
    with apply_subnet(fresh.pipe, loaded):
        assert torch.equal(images(fresh, **loaded.call_kwargs()), expected)


# images that are not finite -----------------------------------------------------------------------


def test_latents_that_are_not_finite_name_denoiser_and_dtype(sd: LoadedModel) -> None:
    broken = tiny_model(tiny_sd())
    broken.denoiser.conv_out.bias.data.fill_(float("nan"))  # type: ignore[union-attr, operator]
    subnet = mixed(sd)
    set_sampler(broken, DDIM)
    with (
        apply_subnet(broken.pipe, subnet),
        pytest.raises(SubNetError, match=r"UNet2DConditionModel of tiny in float32.*bfloat16"),
    ):
        images(broken)


def test_images_that_are_not_finite_name_the_autoencoder(sd: LoadedModel) -> None:
    broken = tiny_model(tiny_sd())
    broken.pipe.vae.post_quant_conv.bias.data.fill_(float("inf"))
    subnet = mixed(sd)
    set_sampler(broken, DDIM)
    with (
        apply_subnet(broken.pipe, subnet),
        pytest.raises(
            SubNetError, match="AutoencoderKL of tiny in float32.*the SubNet has no part"
        ),
    ):
        images(broken)


def test_an_autoencoder_replaced_after_applying_is_watched(sd: LoadedModel) -> None:
    old = sd.pipe.vae
    with apply_subnet(sd.pipe, mixed(sd)):
        sd.pipe.vae = copy.deepcopy(old)
        with torch.no_grad():
            sd.pipe.vae.post_quant_conv.weight.fill_(float("nan"))
        with pytest.raises(SubNetError, match="makes images of them that are not"):
            images(sd)
        assert "decode" not in vars(old)
    assert "decode" not in vars(tiny_sd().vae)


@dataclass
class Streaming:
    """What diffusers leaves on modules: a registry with a hook, whose group has a stream."""

    stream: object = None

    def get_hook(self, name: str) -> Any:
        return SimpleNamespace(group=self) if name == "group_offloading" else None


def test_group_offloading_with_streams_is_refused(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    block = vars(sd.denoiser.get_submodule("mid_block"))
    block["_diffusers_hook"] = Streaming()
    with apply_subnet(sd.pipe, subnet):
        block["_diffusers_hook"] = Streaming(stream=object())
        with pytest.raises(SubNetError, match="group offloading with streams.*This works"):
            images(sd)
    with pytest.raises(SubNetError, match="group offloading with streams"):
        apply_subnet(sd.pipe, subnet)


def test_an_ip_adapter_is_refused_by_its_name(sd: LoadedModel) -> None:
    subnet = mixed(sd)
    sd.pipe.unet.config["encoder_hid_dim_type"] = "ip_image_proj"
    with pytest.raises(SubNetMismatchError, match=r"has an IP-Adapter.*unload_ip_adapter"):
        apply_subnet(sd.pipe, subnet)
