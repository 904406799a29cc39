"""What a CLIP must hold. Oracle: the state dict of transformers' CLIPModel, and the bundled one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModelWithProjection

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.clip_files import clip_tensors
from dipgo_core.evaluation.scorers import clip_scorer, cmmd_scorer, dino_scorer
from dipgo_core.zoo import zoo_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo_path("tiny-clip"), tmp_path / "clip"))


@pytest.mark.parametrize(
    ("model_class", "reads_prompts"), [(CLIPModel, True), (CLIPVisionModelWithProjection, False)]
)
def test_tensors_are_those_of_the_model(model_class, reads_prompts: bool) -> None:
    folder = zoo_path("tiny-clip")
    config = CLIPConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = model_class(config if reads_prompts else config.vision_config)
    buffers = {name for name, _ in model.named_buffers()}
    expected = set(model.state_dict()) - buffers

    assert clip_tensors(folder, reads_prompts=reads_prompts) == expected


@pytest.mark.parametrize("tensor", ["visual_projection.weight", "text_projection.weight"])
def test_clip_that_lacks_a_tensor_is_refused_unloaded(folder: Path, tensor: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[tensor]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelFilesError, match=f"lacks 1 of the tensors of a CLIP.* {tensor}:"):
        clip_scorer(str(folder))


def test_image_tower_needs_no_tensor_of_the_texts(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith("text")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})

    assert cmmd_scorer(str(folder)).id == "clip"


@pytest.mark.parametrize("file", ["tokenizer.json", "processor_config.json"])
def test_clip_that_cannot_prepare_its_input_is_refused(folder: Path, file: str) -> None:
    (folder / file).unlink()

    with pytest.raises(
        ModelFilesError, match=r"lacks (tokenizer|preprocessor_config)\.json, which"
    ):
        clip_scorer(str(folder))


def test_depth_may_be_said_in_an_old_place(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config_dict"] = {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))

    with pytest.raises(ModelFilesError, match=r"lacks 16 of .*text_model\.encoder\.layers\.2\."):
        clip_scorer(str(folder))


def test_dinov2_without_image_processor_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "dinov2"}')
    (folder / "processor_config.json").unlink()

    with pytest.raises(ModelFilesError, match=r"lacks preprocessor_config\.json, which the dino"):
        dino_scorer(str(folder))
