"""ImageReward. Oracle: its forward pass spelled out from the published tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from reward_by_hand import reward_by_hand
from tiny_scorers import random_images, reward_weights, save_image_reward
from torchvision import transforms
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from dipgo_core.errors import EvaluationError, HubError, ModelFilesError
from dipgo_core.evaluation.image_reward import RewardScorer, image_rewards, load_image_reward
from dipgo_core.evaluation.image_reward_files import WEIGHTS
from dipgo_core.evaluation.scorers import image_reward_scorer
from dipgo_core.model_files import file_sha256

PROMPTS = ["a red cat", "the dogs", "a cat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_image_reward(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def reward(folder: Path) -> RewardScorer:
    return load_image_reward(str(folder))


def test_rewards_are_those_of_the_published_network(reward: RewardScorer) -> None:
    images = random_images(3)
    mean, std = (torch.tensor(v)[:, None, None] for v in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    tokens = torch.zeros(3, 35, dtype=torch.long)
    tokens[0, :5] = torch.tensor([2, 4, 5, 6, 3])  # [CLS] a red cat [SEP]
    tokens[1, :5] = torch.tensor([2, 9, 7, 8, 3])  # [CLS] the dog ##s [SEP]
    tokens[2, :4] = torch.tensor([2, 4, 6, 3])
    expected = reward_by_hand(reward_weights(), (images / 255 - mean) / std, tokens, tokens > 0)

    assert image_rewards(reward, images, PROMPTS) == pytest.approx(expected.numpy(), rel=1e-4)


def test_larger_images_are_shrunk_and_cut_as_the_authors_do(reward: RewardScorer) -> None:
    images = random_images(1, side=80)[:, :, :64]
    theirs = transforms.Compose(
        [
            transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(32),
            transforms.PILToTensor(),
        ]
    )
    small = theirs(Image.fromarray(images[0].permute(1, 2, 0).numpy()))[None]

    ours = image_rewards(reward, images, PROMPTS[:1])

    assert ours == pytest.approx(image_rewards(reward, small, PROMPTS[:1]), rel=1e-2)


def test_reward_of_an_image_does_not_depend_on_the_batch(reward: RewardScorer) -> None:
    images = random_images(20)
    prompts = ["a cat", "the red dog"] * 10

    whole = image_rewards(reward, images, prompts)

    assert whole[18:] == pytest.approx(image_rewards(reward, images[18:], prompts[18:]), rel=1e-4)


def test_long_prompts_are_cut_and_unknown_words_read(reward: RewardScorer) -> None:
    assert image_rewards(reward, random_images(1), ["Red, zebra " * 50]).shape == (1,)


def test_folder_is_known_by_both_files(folder: Path) -> None:
    scorer = image_reward_scorer(str(folder))

    parts = [file_sha256(folder / name) for name in (WEIGHTS, "vocab.txt")]
    assert (scorer.id, scorer.digest) == (folder.name, "+".join(parts))


def test_hub_id_is_known_without_network() -> None:
    scorer = image_reward_scorer("owner/reward@abc")

    assert scorer.id == "owner/reward"
    assert scorer.digest == "hub:owner/reward@abc+google-bert/bert-base-uncased@main"


@pytest.mark.parametrize("revision", ["", "abc", "a+b"])
def test_commit_of_the_vocabulary_is_in_the_digest(revision: str) -> None:
    words = "b" * 40

    scorer = image_reward_scorer(f"owner/reward@{revision}+{words}")

    assert scorer.id == "owner/reward"
    assert scorer.digest == (
        f"hub:owner/reward@{revision or 'main'}+google-bert/bert-base-uncased@{words}"
    )


def test_from_the_hub_weights_and_vocabulary_are_fetched(fake_hub, folder: Path) -> None:
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS, "vocab.txt")}
    commit = fake_hub.put("owner/reward", {WEIGHTS: files[WEIGHTS]})
    words = fake_hub.put("google-bert/bert-base-uncased", {"vocab.txt": files["vocab.txt"]})
    pinned = f"owner/reward@{commit}+{words}"

    assert load_image_reward("owner/reward").scorer == image_reward_scorer(pinned)
    fake_hub.put("google-bert/bert-base-uncased", {"vocab.txt": b"moved"})
    assert load_image_reward(pinned).scorer == image_reward_scorer(pinned)


def test_missing_files_are_named_with_their_size_and_place(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").touch()

    with pytest.raises(ModelFilesError, match=r"ImageReward.pt missing; put .*1.8 GB"):
        load_image_reward(str(tmp_path))


def test_offline_hub_id_says_how_to_get_it(monkeypatch) -> None:
    with pytest.raises(HubError, match="owner/reward.*HF_HUB_OFFLINE is set"):
        load_image_reward("owner/reward")


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("blip.visual_encoder.norm.bias", "does not hold the weights of an ImageReward"),
        ("blip.text_encoder.encoder.layer.1.output.dense.bias", "Missing key"),
        ("mlp.layers.7.bias", "does not hold the weights of an ImageReward"),
    ],
)
def test_weights_are_never_left_at_random(lost: str, message: str, folder, tmp_path) -> None:
    weights = reward_weights()
    del weights[lost]
    torch.save(weights, tmp_path / WEIGHTS)
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())

    with pytest.raises(ModelFilesError, match=message):
        load_image_reward(str(tmp_path))


def test_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes())
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\nzebra\n")

    with pytest.raises(ModelFilesError, match="has 5 words, the weights were trained with 10"):
        load_image_reward(str(tmp_path))


def test_other_numbers_of_prompts_are_refused(reward: RewardScorer) -> None:
    with pytest.raises(EvaluationError, match="got 3 and 1"):
        image_rewards(reward, random_images(3), PROMPTS[:1])


def test_rewards_that_are_not_finite_are_refused(folder: Path) -> None:
    broken = load_image_reward(str(folder))
    broken.head[0].weight.fill_(float("nan"))

    with pytest.raises(EvaluationError, match="not finite"):
        image_rewards(broken, random_images(1), PROMPTS[:1])
