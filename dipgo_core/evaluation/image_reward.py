"""ImageReward: how well people would like an image for its prompt (Xu et al. 2023).

A BLIP (an image transformer, and a BERT that looks at its output) ends in five linear layers. It is
built from transformers' parts and filled from the published weights, whose shapes tell all widths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, normalize, resize
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dipgo_core.errors import EvaluationError, ModelFilesError
from dipgo_core.evaluation.image_reward_files import (
    VOCABULARY_ID,
    RewardFiles,
    reward_files,
    words_of,
)
from dipgo_core.evaluation.published import read_tensors
from dipgo_core.evaluation.scorers import Scorer, image_reward_scorer
from dipgo_core.evaluation.vision_model import check_finite, check_images

#: The published weights give rewards of this mean and deviation over the authors' training images.
_MEAN: Final = 0.16717362830052426
_DEVIATION: Final = 1.0333394966054072
_TOKENS: Final = 35  # a longer prompt is cut
_HEAD_WIDTH: Final = 64  # of each attention head, in both transformers
_CHUNK: Final = 16  # images the model sees at once

#: Where the published name of a vision tensor differs from transformers', part by part.
_VISION_NAMES: Final = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj", "embeddings.patch_embedding"),
    ("blocks.", "encoder.layers."),
    ("attn.qkv", "self_attn.qkv"),
    ("attn.proj", "self_attn.projection"),
    ("norm1", "layer_norm1"),
    ("norm2", "layer_norm2"),
)


@dataclass(frozen=True, eq=False)
class RewardScorer:
    """A loaded ImageReward."""

    scorer: Scorer
    vision: Any
    text: Any
    head: Any
    tokenizer: Any


def load_image_reward(name: str, *, device: str | torch.device = "cpu") -> RewardScorer:
    """Load ImageReward by hub id (``owner/name@revision``) or folder, from tensors only.

    Raises:
        ModelFilesError: files are missing, torn, or not those of an ImageReward.
    """
    files = reward_files(name)
    state = read_tensors(files.weights)
    try:
        vision, text, head = _networks(state)
    except (KeyError, IndexError, RuntimeError) as error:
        raise ModelFilesError(
            f"{files.weights} does not hold the weights of an ImageReward: {error}"
        ) from error
    return RewardScorer(
        scorer=image_reward_scorer(files.name),
        vision=vision.to(device),
        text=text.to(device),
        head=head.to(device),
        tokenizer=_tokenizer(files, int(text.config.vocab_size)),
    )


@torch.no_grad()
def image_rewards(
    reward: RewardScorer, images: Tensor, prompts: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return the reward of each image for its prompt.  # (n, 3, H, W) uint8 -> (n,)

    Raises:
        EvaluationError: another number of prompts than images, or a reward that is not finite.
    """
    check_images(images, reward.scorer.id)
    if len(images) != len(prompts):
        raise EvaluationError(f"each image needs its prompt, got {len(images)} and {len(prompts)}")
    parts = [
        _rewards(reward, images[start : start + _CHUNK], prompts[start : start + _CHUNK])
        for start in range(0, len(images), _CHUNK)
    ]
    rewards: npt.NDArray[np.float64] = torch.cat(parts).double().cpu().numpy()
    return rewards


def _rewards(reward: RewardScorer, images: Tensor, prompts: Sequence[str]) -> Tensor:
    device = reward.vision.device
    pixels = _pixels(images.to(device), int(reward.vision.config.image_size))
    seen = reward.vision(pixel_values=pixels).last_hidden_state  # (n, patches, d)
    tokens = reward.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=_TOKENS,
        return_tensors="pt",
    ).to(device)
    read = reward.text(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        encoder_hidden_states=seen,
        encoder_attention_mask=torch.ones(seen.shape[:-1], dtype=torch.long, device=device),
    ).last_hidden_state[:, 0]  # of the first token
    rewards = (reward.head(read).squeeze(-1) - _MEAN) / _DEVIATION  # (n,)
    return check_finite(rewards, reward.scorer.id)


def _pixels(images: Tensor, side: int) -> Tensor:
    small = resize(images, [side], InterpolationMode.BICUBIC, antialias=True)
    square = center_crop(small, [side, side]).float() / 255
    pixels: Tensor = normalize(square, list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD))
    return pixels


def _networks(state: Mapping[str, Tensor]) -> tuple[Any, Any, Any]:
    """Build and fill the image transformer, the text transformer and the head."""
    seen = {_vision_name(k): v for k, v in _part(state, "blip.visual_encoder.").items()}
    read = _part(state, "blip.text_encoder.")
    read.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    layers = _part(state, "mlp.layers.")
    vision = BlipVisionModel(_vision_config(seen))
    text = BlipTextModel(_text_config(read), add_pooling_layer=False)
    head = _head(layers)
    vision.load_state_dict(seen)
    text.load_state_dict(read)
    head.load_state_dict(_renumbered(layers))
    for part in (vision, text, head):
        part.float().eval().requires_grad_(False)
    return vision, text, head


def _head(layers: Mapping[str, Tensor]) -> nn.Sequential:
    weights = [
        tensor
        for name, tensor in sorted(layers.items(), key=_layer_number)
        if name.endswith("weight")
    ]
    return nn.Sequential(*(nn.Linear(tensor.shape[1], tensor.shape[0]) for tensor in weights))


def _vision_config(seen: Mapping[str, Tensor]) -> BlipVisionConfig:
    width, _, patch, _ = seen["embeddings.patch_embedding.weight"].shape
    patches = seen["embeddings.position_embedding"].shape[1] - 1  # one is the class token
    return BlipVisionConfig(
        hidden_size=width,
        intermediate_size=seen["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=_depth(seen, "encoder.layers."),
        num_attention_heads=width // _HEAD_WIDTH,
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )


def _text_config(read: Mapping[str, Tensor]) -> BlipTextConfig:
    vocabulary, width = read["embeddings.word_embeddings.weight"].shape
    return BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        encoder_hidden_size=read["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        intermediate_size=read["encoder.layer.0.intermediate.dense.weight"].shape[0],
        num_hidden_layers=_depth(read, "encoder.layer."),
        num_attention_heads=width // _HEAD_WIDTH,
        max_position_embeddings=read["embeddings.position_embeddings.weight"].shape[0],
        layer_norm_eps=1e-12,
        bos_token_id=None,  # nothing is generated
        eos_token_id=None,
        sep_token_id=None,
    )


def _tokenizer(files: RewardFiles, size: int) -> Any:
    """BERT's tokenizer; the two tokens that BLIP adds to it are never written in a prompt."""
    words = words_of(files.vocabulary)
    if len(words) + 2 != size:
        raise ModelFilesError(
            f"{files.vocabulary} has {len(words)} words, the weights were trained with "
            f"{size - 2}: it must be the vocabulary of {VOCABULARY_ID}"
        )
    return BertTokenizer(vocab={word: number for number, word in enumerate(words)})


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def _vision_name(name: str) -> str:
    if name in ("norm.weight", "norm.bias"):
        return f"post_layer{name}"
    for theirs, ours in _VISION_NAMES:
        name = name.replace(theirs, ours)
    return name


def _depth(state: Mapping[str, Tensor], prefix: str) -> int:
    numbers = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    return len(numbers)


def _layer_number(entry: tuple[str, Tensor]) -> int:
    return int(entry[0].split(".")[0])


def _renumbered(layers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Number the layers of the head without the dropouts between them."""
    numbers = sorted({_layer_number(entry) for entry in layers.items()})
    return {
        f"{numbers.index(_layer_number((name, tensor)))}.{name.split('.')[1]}": tensor
        for name, tensor in layers.items()
    }
