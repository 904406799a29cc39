"""A CLIP that scores the images of shrunk models: real classes and files, seeded weights."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from dipgo_core.zoo.shrunk.parts import CLIP_TOKENS, clip_tokenizer, seeded

WIDTH: Final = 32
IMAGE_SIZE: Final = 32


def write_clip(folder: Path) -> Path:
    """Save the CLIP in the files that transformers saves; return the folder."""
    tokenizer = clip_tokenizer()
    transformer = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
        "projection_dim": WIDTH,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CLIP_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config={**transformer, **text},
        vision_config={**transformer, "image_size": IMAGE_SIZE, "patch_size": 8},
        projection_dim=WIDTH,
    )
    seeded(CLIPModel(config), 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    ).save_pretrained(folder)
    return folder
