"""The code of docs/runtime.md runs from top to bottom, on the bundled model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionPipeline
from fake_hub import FakeHub
from peft import LoraConfig, get_peft_model_state_dict

from dipgo_core.binding import subnet_of
from dipgo_core.config import ModelSettings, SamplerSettings
from dipgo_core.gates import GateTable
from dipgo_core.pipelines import LoadedModel, block_graph, load_model
from dipgo_core.zoo import zoo_path

PAGE = Path(__file__).parents[1] / "docs" / "runtime.md"
SAMPLER = SamplerSettings(scheduler="ddim", steps=4, guidance_scale=3.0)

#: What this machine has not, and what takes its place.
INSTEAD = {
    '"cuda"': '"cpu"',
    "torch.bfloat16": "torch.float32",
    '"stable-diffusion-v1-5/stable-diffusion-v1-5"': f'"{zoo_path("tiny-sd")}"',
    '"lllyasviel/control_v11p_sd15_canny"': '"controlnet"',
    ".compile()": '.compile(backend="eager")',
    "min_runs=10": "min_runs=2, min_seconds=0, warmup=0, tries=1",
    "resample(30)": "resample(3)",
}


def code_of_the_page() -> list[str]:
    found = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    text = "\0".join(found)
    for there, here in INSTEAD.items():
        assert there in text, there
        text = text.replace(there, here)
    return text.split("\0")


def write_parts(model: LoadedModel, folder: Path) -> None:
    """Write the SubNet, the LoRA and the ControlNet that the page names."""
    graph = block_graph(model)
    rows = ["1" * graph.num_blocks, "0" * graph.num_blocks] * 2
    subnet = subnet_of(model, graph, SAMPLER, GateTable.from_strings(rows))
    subnet.save(folder / "subnet.json")
    unet: Any = model.denoiser
    control = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8))
    control.save_pretrained(folder / "controlnet")
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights="gaussian"))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, weight_name="lora.safetensors"
    )


@pytest.mark.slow
def test_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fake_hub: FakeHub
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    write_parts(load_model(ModelSettings(id="tiny-sd")), tmp_path)
    names: dict[str, Any] = {}
    for block in code_of_the_page():
        exec(compile(block, str(PAGE), "exec"), names)
        images = names["images"]
        assert len(images) == 1 and np.isfinite(np.asarray(images[0])).all()
    assert torch.isfinite(names["latents"]).all()
    assert names["measured"].macs_speedup["all"] == 2.0
    assert names["thirty"].provenance["resampled_from"]["steps"] == 4
