"""CLIP score: 100 x the cosine of image and prompt (Hessel et al. 2021), unclipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPProcessor

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.open_clip_inputs import open_clip_pixels, open_clip_tokens
from dipgo_core.evaluation.open_clip_weights import load_open_clip
from dipgo_core.evaluation.scorers import OPEN_CLIP, Scorer, clip_scorer, model_type_of
from dipgo_core.evaluation.vision_model import fetched_network, load_whole

_CHUNK = 64  # images or texts the model sees at once


@dataclass(frozen=True, eq=False)
class ClipScorer:
    """A loaded CLIP. texts: unit features of prompts met so far, filled as they come.

    tokens: prompts in, input_ids and attention_mask out, each (n, context length). pixels: uint8
    images (n, 3, H, W) in, what the image tower sees out.
    """

    scorer: Scorer
    model: Any
    tokens: Callable[[Sequence[str]], Any]
    pixels: Callable[[Tensor], Tensor]
    texts: dict[str, Tensor] = field(default_factory=dict)


def load_clip(name: str, *, device: str | torch.device = "cpu") -> ClipScorer:
    """Load a CLIP by bundled name, local folder or ``owner/name@revision`` on the hub, saved by
    transformers or by open_clip, from safetensors only.

    Raises:
        ModelFilesError: files are missing or broken, or the hub cannot be reached; names them.
    """
    pinned, folder = fetched_network(name)
    scorer = clip_scorer(pinned)
    if model_type_of("clip", folder) == OPEN_CLIP:
        model, config = load_open_clip(folder)
        tokens = open_clip_tokens(folder, config)
        pixels = partial(open_clip_pixels, config=config)
    else:
        model, processor = load_whole(folder, CLIPModel, CLIPProcessor)
        length = model.config.text_config.max_position_embeddings
        tokens = partial(_tokens, processor.tokenizer, length)
        pixels = partial(_pixels, processor.image_processor)
    return ClipScorer(scorer, model.to(device), tokens, pixels)


def _tokens(tokenizer: Any, length: int, prompts: Sequence[str]) -> Any:
    return tokenizer(
        list(prompts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
    )


def _pixels(processor: Any, images: Tensor) -> Tensor:
    pixels: Tensor = processor(images=list(images.cpu()), return_tensors="pt")["pixel_values"]
    return pixels


@torch.no_grad()
def clip_scores(
    clip: ClipScorer, images: Tensor, prompts: Sequence[str]
) -> npt.NDArray[np.float64]:
    """Return 100 x cosine of each image with its prompt.  # (n, 3, H, W) uint8 -> (n,)

    Raises:
        EvaluationError: another number of prompts than images, or a score that is not finite.
    """
    if len(images) != len(prompts):
        raise EvaluationError(f"each image needs its prompt, got {len(images)} and {len(prompts)}")
    _remember(clip, prompts)
    seen = torch.cat([_image_features(clip, part) for part in _chunks(images)])  # (n, d)
    said = torch.stack([clip.texts[prompt] for prompt in prompts])
    scores: npt.NDArray[np.float64] = (100 * (seen * said).sum(dim=-1)).double().cpu().numpy()
    if not np.isfinite(scores).all():
        raise EvaluationError(f"{clip.scorer.id} returned scores that are not finite")
    return scores


def _remember(clip: ClipScorer, prompts: Sequence[str]) -> None:
    """Put the features of prompts not met before into the cache."""
    fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in clip.texts]
    for start in range(0, len(fresh), _CHUNK):
        part = fresh[start : start + _CHUNK]
        tokens = clip.tokens(part).to(clip.model.device)
        output = clip.model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        )
        clip.texts.update(zip(part, _unit(output), strict=True))


def _image_features(clip: ClipScorer, images: Tensor) -> Tensor:
    values = clip.pixels(images).to(clip.model.device, clip.model.dtype)
    return _unit(clip.model.get_image_features(pixel_values=values))


def _chunks(images: Tensor) -> list[Tensor]:
    return [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]


def _unit(output: Any) -> Tensor:
    """Return unit features in float32; newer transformers wrap them in an output object."""
    features = output if isinstance(output, Tensor) else output.pooler_output
    return functional.normalize(features.float(), dim=-1)
