"""The bundled models before training: every size that matters, in one place."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Final

from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from dipgo_core.zoo.data import IMAGE_SIZE, all_captions

LATENT_SIZE: Final = 8
TEXT_WIDTH: Final = 64
MAX_TOKENS: Final = 16
NULL_CLASS: Final = 1000  # DiTPipeline hard-codes it as the class of the unconditional branch

_BEGIN, _END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def build_tokenizer() -> CLIPTokenizer:
    """Builds a byte-pair vocabulary in which every word of a caption is one token."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges = learn_merges(sorted({word for text in all_captions() for word in text.split()}))
    symbols = [*letters, *(letter + _WORD_END for letter in letters), *map("".join, merges)]
    vocab = {symbol: index for index, symbol in enumerate([_BEGIN, _END, *symbols])}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Joins the most frequent pair until every word is whole; ties go by the alphabet.

    The trainer of ``tokenizers`` breaks ties differently in every process.
    """
    spellings = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for spelling in spellings for pair in pairwise(spelling)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spellings = [_join(spelling, best) for spelling in spellings]
    return merges


def _join(spelling: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in spelling:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Returns tiny-sd's text encoder, which is trained together with the U-Net."""
    return CLIPTextModel(_text_config(tokenizer))


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns the scorer: a vision transformer on 8x8 patches beside a text transformer."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=384,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    text = _text_config(tokenizer)
    return CLIPModel(
        CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=TEXT_WIDTH
        )
    )


def build_image_processor() -> CLIPImageProcessor:
    """Returns the processor that brings any image to 32x32 and to [-1, 1]."""
    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_vae() -> AutoencoderKL:
    """Returns the autoencoder both pipelines share: 32x32 pixels to 8x8 latents of 4 channels."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
    )


def build_unet() -> UNet2DConditionModel:
    """Returns tiny-sd's denoiser: SD-1.5's topology and its channel ratio 1:2:4:4."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(24, 48, 96, 96),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def build_dit() -> DiTTransformer2DModel:
    """Returns tiny-dit's denoiser: ten blocks on 16 tokens, classes 0 to 279 and the null class."""
    return DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=10,
        sample_size=LATENT_SIZE,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )


def build_noise_scheduler() -> DDIMScheduler:
    """Returns SD-1.5's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
