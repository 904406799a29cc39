"""CLIP score: a seeded tiny CLIP, against the model's own logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fake_hub import FakeHub
from safetensors.torch import load_file, save
from tiny import tiny_tokenizer
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from dipgo_core.errors import EvaluationError, ModelFilesError
from dipgo_core.evaluation.clip_score import ClipScorer, clip_scores, load_clip

PROMPTS = ["a red cat", "the blue moon", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    text = CLIPTextConfig(
        **small,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vision = CLIPVisionConfig(**small, num_attention_heads=2, image_size=16, patch_size=8)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    target = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(target)
    CLIPProcessor(processor, tokenizer).save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipScorer:
    return load_clip(str(folder))


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=generator)


def test_scores_are_100_times_the_models_own_cosine(clip: ClipScorer, folder: Path, images) -> None:
    processor = CLIPProcessor.from_pretrained(folder)
    inputs = processor(text=PROMPTS, images=list(images), padding=True, return_tensors="pt")
    with torch.no_grad():
        output = clip.model(**inputs)

    scores = clip_scores(clip, images, PROMPTS)

    cosines = output.logits_per_image.diagonal() / clip.model.logit_scale.exp()
    assert scores == pytest.approx(100 * cosines.detach().numpy(), abs=1e-4)


def test_each_text_is_encoded_once(clip: ClipScorer, images, monkeypatch) -> None:
    fresh = ClipScorer(clip.scorer, clip.model, clip.tokens, clip.pixels)
    calls: list[int] = []
    encode = clip.model.get_text_features
    monkeypatch.setattr(
        clip.model,
        "get_text_features",
        lambda **inputs: calls.append(len(inputs["input_ids"])) or encode(**inputs),
    )

    first = clip_scores(fresh, images, ["a cat", "a cat", "a dog"])
    again = clip_scores(fresh, images, ["a cat", "a cat", "a dog"])

    assert calls == [2]
    assert np.array_equal(first, again)


def test_score_of_an_image_does_not_depend_on_the_batch(clip: ClipScorer, images) -> None:
    alone = clip_scores(clip, images[2:], PROMPTS[2:])

    assert alone == pytest.approx(clip_scores(clip, images, PROMPTS)[2:], abs=1e-4)


def test_long_prompts_are_cut_not_refused(clip: ClipScorer, images) -> None:
    assert np.isfinite(clip_scores(clip, images[:1], ["a red cat " * 50])).all()


def test_other_numbers_of_prompts_are_refused(clip: ClipScorer, images) -> None:
    with pytest.raises(EvaluationError, match="got 3 and 2"):
        clip_scores(clip, images, PROMPTS[:2])


def test_corrupt_weights_are_one_clear_error(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"torn")

    with pytest.raises(ModelFilesError, match="damaged weights: .*model.safetensors"):
        load_clip(str(tmp_path))


def test_weights_are_never_left_at_random(folder: Path, fake_hub: FakeHub) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    torn = {"model.safetensors": save(weights, metadata={"format": "pt"})}
    fake_hub.put("owner/clip", files | torn)

    with pytest.raises(ModelFilesError, match=r"lacks 1 .*visual_projection\.weight"):
        load_clip("owner/clip")


def test_hub_id_is_loaded_at_its_commit(folder: Path, fake_hub: FakeHub) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = fake_hub.put("owner/clip", {**files, "open_clip_model.safetensors": b"another"})
    loaded = load_clip("owner/clip")
    assert (loaded.scorer.id, loaded.scorer.digest) == ("owner/clip", f"hub:owner/clip@{commit}")
    assert load_clip(f"owner/clip@{commit}").scorer == loaded.scorer
    assert fake_hub.downloads["owner/clip/open_clip_model.safetensors"] == 0


def test_hub_repository_without_a_config_is_refused_before_weights_are_fetched(
    folder: Path, fake_hub: FakeHub
) -> None:
    fake_hub.put("owner/clip", {"open_clip_pytorch_model.bin": b"p", "tokenizer.json": b"{}"})
    with pytest.raises(ModelFilesError, match="owner/clip at .* has no config.json, model.safet"):
        load_clip("owner/clip")
    assert not fake_hub.downloads


def test_hub_id_without_network_says_what_to_do() -> None:
    with pytest.raises(ModelFilesError, match=r"owner/clip cannot be read .*name a local folder"):
        load_clip("owner/clip")
