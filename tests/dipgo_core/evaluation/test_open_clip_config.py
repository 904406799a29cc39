"""What open_clip_config.json says. Oracle: open_clip's own configs of published models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from tiny_open_clip import MODEL

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.open_clip_config import OpenClip, read_open_clip


def read(folder: Path, model: Any, preprocess: Any = None) -> OpenClip:
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return read_open_clip(folder)


@pytest.mark.parametrize("name", ["ViT-L-14-336", "ViT-g-14", "ViT-bigG-14"])
def test_published_models_are_as_wide_as_open_clip_builds_them(name: str, tmp_path: Path) -> None:
    config = open_clip.get_model_config(name)
    config["vision_cfg"]["layers"] = config["text_cfg"]["layers"] = 1  # built in a moment
    found = read(tmp_path, config)

    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    for tower, theirs in (
        (found.vision, model.visual.transformer),
        (found.text, model.transformer),
    ):
        block = theirs.resblocks[0]
        built = (theirs.layers, theirs.width, block.attn.num_heads, block.mlp.c_fc.out_features)
        assert (tower.layers, tower.width, tower.heads, tower.mlp_width) == built
    assert (found.image_size,) * 2 == model.visual.image_size
    assert model.text_projection.shape == (found.text.width, found.embed_dim)


def test_what_is_not_said_is_open_clips_default(tmp_path: Path) -> None:
    found = read(tmp_path, {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}})

    with torch.device("meta"):
        theirs = open_clip.CLIP(8, open_clip.CLIPVisionCfg(), open_clip.CLIPTextCfg())
    assert found.vision.width == theirs.visual.transformer.width
    assert found.vision.heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert found.text.heads == theirs.transformer.resblocks[0].attn.num_heads
    assert found.patch_size == theirs.visual.patch_size[0]
    assert found.activation == "gelu"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ViT-B-16-SigLIP", "model_cfg.init_logit_bias is -10"),
        ("roberta-ViT-B-32", "text_cfg.hf_model_name is 'roberta-base'"),
        ("coca_ViT-B-32", "text_cfg.embed_cls is True|multimodal_cfg|attentional_pool is True"),
        ("convnext_base", "vision_cfg.timm_model_name is 'convnext_base'"),
        ("RN50", r"layers is \[3, 4, 6, 3\]"),
        ("EVA01-g-14", "custom_text is True"),
    ],
)
def test_other_kinds_of_towers_are_refused_by_field(name: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=told):
        read(tmp_path, open_clip.get_model_config(name))


@pytest.mark.parametrize(
    ("model", "preprocess", "told"),
    [
        ({**MODEL, "embed_dim": "12"}, {}, "embed_dim is '12'"),
        ({**MODEL, "vision_cfg": {"width": 11, "head_width": 4}}, {}, "11 is no multiple of 2"),
        ({**MODEL, "vision_cfg": {"image_size": [224, 336]}}, {}, r"image_size is \[224, 336\]"),
        ({**MODEL, "vision_cfg": {"mlp_ratio": "4"}}, {}, "mlp_ratio is '4'"),
        ({**MODEL, "vision_cfg": {"pool_type": "avg"}}, {}, "pool_type is 'avg'"),
        ({**MODEL, "text_cfg": {"no_causal_mask": True}}, {}, "no_causal_mask is True"),
        ({**MODEL, "text_cfg": {"hf_tokenizer_name": "t5"}}, {}, "hf_tokenizer_name is 't5'"),
        ({"embed_dim": 8}, {}, "no section vision_cfg"),
        (None, {}, "no section model_cfg"),
        (MODEL, {"resize_mode": "crop"}, "preprocess_cfg.resize_mode is 'crop'"),
        (MODEL, {"mean": [0.5]}, r"preprocess_cfg.mean is \[0.5\]"),
        (MODEL, [1], "preprocess_cfg is no section"),
    ],
)
def test_wrong_fields_are_named(model: Any, preprocess: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=told):
        read(tmp_path, model, preprocess)


def test_file_that_is_no_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text("{torn")
    with pytest.raises(ModelFilesError, match=r"open_clip_config\.json cannot be read"):
        read_open_clip(tmp_path)


@pytest.mark.parametrize(
    ("preprocess", "words"),
    [
        (None, "Pillow's bicubic to 28 on the shorter side, then the middle square"),
        ({"interpolation": "random", "resize_mode": "squash"}, "Pillow's bicubic to 28x28"),
        (
            {"interpolation": "bilinear", "resize_mode": "longest"},
            "Pillow's bilinear to 28 on the longer side, then padded to a square",
        ),
    ],
)
def test_resize_is_said_in_words(preprocess: Any, words: str, tmp_path: Path) -> None:
    assert read(tmp_path, MODEL, preprocess).resize == words
