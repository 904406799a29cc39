"""What the shrunk models share: tokenizers of any text, text encoders, autoencoders, weights."""

from __future__ import annotations

import string
import zlib
from typing import Any, Final, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

Network = TypeVar("Network", bound=nn.Module)

CLIP_TOKENS: Final = 77
#: Spread of biases and of what norms scale by; of weights it is that of one over their inputs.
_SPREAD: Final = 0.1


def clip_tokenizer(*, pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """Return a CLIP tokenizer without merges: every byte is a token, any text can be written."""
    letters = _byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=CLIP_TOKENS)


def _byte_letters() -> list[str]:
    """Return the letter that byte-level vocabularies write for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in printable)
    moved = {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [moved.get(byte, chr(byte)) for byte in range(256)]


def t5_tokenizer(tokens: int) -> T5Tokenizer:
    """Return a T5 tokenizer that reads ASCII letter by letter. tokens: the longest text."""
    letters = string.ascii_letters + string.digits + string.punctuation
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [*special, ("▁", -2.0), *((letter, -3.0) for letter in letters)]
    return T5Tokenizer(vocab=words, extra_ids=0, model_max_length=tokens)


def clip_text_encoder(
    tokenizer: CLIPTokenizer, seed: int, *, width: int, activation: str, projected: bool = False
) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a CLIP text encoder of two layers. projected: with the pooled projection."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CLIP_TOKENS,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    network = CLIPTextModelWithProjection if projected else CLIPTextModel
    return seeded(network(config), seed)


def t5_encoder(tokenizer: T5Tokenizer, seed: int, *, width: int) -> T5EncoderModel:
    """Return the encoder half of a T5 v1.1 of two layers."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 2,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return seeded(T5EncoderModel(config), seed)


def autoencoder(seed: int, **settings: Any) -> AutoencoderKL:
    """Return an autoencoder of four levels, as all these models have: 8 pixels a latent."""
    network = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        **settings,
    )
    return seeded(network, seed)


def seeded(network: Network, seed: int) -> Network:
    """Give every parameter a value of its own, by seed and name: none is left at zero or at one.

    Weights keep the size of what passes through them, so that halves neither overflow nor vanish.
    """
    for name, parameter in network.named_parameters():
        stream = zlib.crc32(f"{seed} {name}".encode())
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(stream))
        if parameter.dim() > 1:
            value = noise * (parameter.shape[0] / parameter.numel()) ** 0.5
        elif name.endswith("weight"):
            value = 1 + _SPREAD * noise
        else:
            value = _SPREAD * noise
        parameter.data.copy_(value)
    return network.eval()
