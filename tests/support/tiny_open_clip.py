"""A tiny CLIP in open_clip's files, written by open_clip: its model, its real vocabulary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

#: The fields of ViT-g-14, at a fraction of its size: heads of a width of their own, an MLP whose
#: width is no whole multiple.
MODEL: Mapping[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {
        "image_size": 28,
        "layers": 2,
        "width": 44,
        "head_width": 11,
        "mlp_ratio": 4.3637,
        "patch_size": 7,
    },
    "text_cfg": {
        "context_length": 77,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 2,
    },
}
PREPROCESS: Mapping[str, Any] = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}


def save_open_clip(
    folder: Path,
    model: Mapping[str, Any] = MODEL,
    preprocess: Mapping[str, Any] = PREPROCESS,
) -> Path:
    """Save a seeded model as open_clip's own push to the hub does."""
    config = {"model_cfg": model, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    saved = open_clip.CLIP(**json.loads(json.dumps(model)))
    for weight in saved.parameters():  # biases and norms start at 0 and 1, which hide mistakes
        torch.nn.init.normal_(weight, mean=weight.data.mean().item(), std=0.3)
    save_file(saved.state_dict(), folder / "open_clip_model.safetensors")
    return save_tokenizer(folder)


def save_tokenizer(folder: Path, pad: str = "!") -> Path:
    """The vocabulary of open_clip's tokenizer in the files of transformers' one."""
    theirs = open_clip.SimpleTokenizer()
    ends = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {ends.get(token, token): number for token, number in theirs.encoder.items()}
    merges = "\n".join(" ".join(pair) for pair in theirs.bpe_ranks)
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
        "model_max_length": 77,
    }
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
