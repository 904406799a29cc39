"""CLIPs of open_clip's format. Oracle: open_clip itself, which reads the same folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from fake_hub import FakeHub
from open_clip.transform import PreprocessCfg, image_transform_v2
from safetensors.torch import load_file, save_file
from tiny_open_clip import MODEL, PREPROCESS, save_open_clip, save_tokenizer
from tiny_scorers import random_images
from torch.nn import functional
from torchvision.transforms import functional as pictures
from transformers import CLIPTokenizer

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.clip_score import ClipScorer, clip_scores, load_clip
from dipgo_core.evaluation.cmmd import load_cmmd
from dipgo_core.evaluation.open_clip_config import read_open_clip
from dipgo_core.evaluation.open_clip_inputs import open_clip_pixels, open_clip_tokens
from dipgo_core.evaluation.open_clip_weights import load_open_clip
from dipgo_core.evaluation.scorers import clip_scorer, cmmd_scorer, files_sha256
from dipgo_core.zoo import captions

WEIGHTS = "open_clip_model.safetensors"
ODD_PROMPTS = [
    "",
    "It’s a “CAFÉ” &amp;amp; bar",
    "the moon\n  over\tGdańsk…  ",
    "a dog's b\u00e2\u20ac\u2122s",  # wrongly decoded once
    "Straße nach İstanbul, ﬁn 🙂 日本語 e\u0301",
    "a red cat on the moon, " * 30,
]


def changed(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """MODEL with other fields in its sections, or beside them."""
    return {
        **MODEL,
        **{
            name: {**MODEL[name], **fields} if isinstance(fields, dict) else fields
            for name, fields in sections.items()
        },
    }


ARCHITECTURES = {
    "as ViT-g-14": MODEL,
    "quick GELU": changed(quick_gelu=True),
    "narrow heads, wide text": changed(
        embed_dim=20,
        vision_cfg={"width": 48, "head_width": 16, "mlp_ratio": 2.6, "layers": 1},
        text_cfg={"width": 24, "heads": 3, "mlp_ratio": 3.3, "layers": 3},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_open_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipScorer:
    return load_clip(str(folder))


def their_model(folder: Path) -> Any:
    return open_clip.create_model(f"local-dir:{folder}").eval().requires_grad_(False)


def their_scores(folder: Path, images: torch.Tensor, prompts: list[str]) -> np.ndarray:
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    pixels = torch.stack([preprocess(pictures.to_pil_image(image)) for image in images])
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts)
    with torch.no_grad():
        seen = model.eval().encode_image(pixels, normalize=True)
        said = model.encode_text(tokens, normalize=True)
    return 100 * (seen * said).sum(-1).numpy()


@pytest.mark.parametrize("fields", ARCHITECTURES.values(), ids=ARCHITECTURES)
@torch.no_grad()
def test_features_are_those_of_open_clip(fields: Mapping[str, Any], tmp_path: Path) -> None:
    theirs = their_model(save_open_clip(tmp_path, fields))
    ours, _ = load_open_clip(tmp_path)
    pixels = torch.randn(3, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.SimpleTokenizer()(["a red cat", "the moon", ""])

    seen = ours.get_image_features(pixels).pooler_output
    said = ours.get_text_features(tokens).pooler_output

    assert torch.allclose(seen, theirs.encode_image(pixels), rtol=1e-5, atol=1e-5)
    assert torch.allclose(said, theirs.encode_text(tokens), rtol=1e-5, atol=1e-5)
    assert said.std(dim=0).min() > 1e-2  # texts are told apart
    assert torch.equal(ours.logit_scale, theirs.logit_scale)


def test_prompts_become_the_same_tokens(clip: ClipScorer) -> None:
    prompts = [*captions("test"), *ODD_PROMPTS]

    assert torch.equal(clip.tokens(prompts).input_ids, open_clip.SimpleTokenizer()(prompts))


def test_vocabulary_may_lie_in_tokenizer_json_alone(folder: Path, clip, tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()

    tokens = open_clip_tokens(tmp_path, read_open_clip(folder))

    assert torch.equal(tokens(ODD_PROMPTS).input_ids, clip.tokens(ODD_PROMPTS).input_ids)


@pytest.mark.parametrize("pad", ["!", "<|endoftext|>"])
def test_what_pads_a_text_does_not_change_its_feature(pad: str, tmp_path: Path) -> None:
    theirs = their_model(save_open_clip(tmp_path))
    save_tokenizer(tmp_path, pad)
    clip = load_clip(str(tmp_path))
    clip_scores(clip, random_images(6), ODD_PROMPTS)

    said = torch.stack([clip.texts[prompt] for prompt in ODD_PROMPTS])

    expected = theirs.encode_text(open_clip.SimpleTokenizer()(ODD_PROMPTS), normalize=True)
    assert torch.allclose(said, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (51, 90), (90, 51), (20, 13), (29, 512)])
@pytest.mark.parametrize(
    "preprocess",
    [
        PREPROCESS,
        {},
        {"interpolation": "bilinear", "mean": 0.5, "std": 0.5},
        {"resize_mode": "squash"},
        {"resize_mode": "longest", "fill_color": 90},
    ],
    ids=["as ViT-g-14", "defaults", "bilinear", "squash", "longest"],
)
def test_pixels_are_those_of_open_clip(
    preprocess: Mapping[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    config = {"model_cfg": MODEL, "preprocess_cfg": preprocess}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    theirs = image_transform_v2(PreprocessCfg(size=28, **preprocess), is_train=False)
    image = functional.interpolate(random_images(1, 100).float(), size=size).to(torch.uint8)

    found = open_clip_pixels(image, read_open_clip(tmp_path))

    assert torch.equal(found[0], theirs(pictures.to_pil_image(image[0])))


@pytest.mark.parametrize("size", [(28, 28), (64, 64), (51, 90)])
def test_scores_are_those_of_open_clip(size: tuple[int, int], clip, folder: Path) -> None:
    images = functional.interpolate(random_images(6, 100).float(), size=size).to(torch.uint8)

    scores = clip_scores(clip, images, ODD_PROMPTS)

    assert scores == pytest.approx(their_scores(folder, images, ODD_PROMPTS), abs=1e-4)
    assert np.ptp(scores) > 1


@torch.no_grad()
def test_image_tower_serves_cmmd(folder: Path) -> None:
    images = random_images(3, side=28)  # the tower's own size
    mean, std = (torch.tensor(PREPROCESS[name])[:, None, None] for name in ("mean", "std"))
    expected = their_model(folder).encode_image((images / 255 - mean) / std, normalize=True)

    embedder = load_cmmd(str(folder))

    assert embedder(images) == pytest.approx(expected.numpy(), abs=1e-5)
    assert embedder.scorer == cmmd_scorer(str(folder))


def test_folder_is_known_by_its_files_and_says_how_it_resizes(folder: Path) -> None:
    scorer = clip_scorer(str(folder))

    assert scorer.digest == files_sha256(folder, [path.name for path in folder.iterdir()])
    assert scorer.resize == "Pillow's bicubic to 28 on the shorter side, then the middle square"


def test_hub_id_is_loaded_at_its_commit(folder: Path, clip, fake_hub: FakeHub) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = fake_hub.put("owner/clip", {**files, "open_clip_pytorch_model.bin": b"pickle"})
    images = random_images(1)

    loaded = load_clip("owner/clip")

    assert loaded.scorer.digest == f"hub:owner/clip@{commit}"
    assert clip_scores(loaded, images, ["a cat"]) == clip_scores(clip, images, ["a cat"])
    assert not fake_hub.downloads["owner/clip/open_clip_pytorch_model.bin"]


def test_half_precision_weights_are_read_as_float32(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").symlink_to(folder / "open_clip_config.json")
    weights = load_file(folder / WEIGHTS)
    save_file({name: value.half() for name, value in weights.items()}, tmp_path / WEIGHTS)

    model, _ = load_open_clip(tmp_path)

    assert model.dtype == torch.float32
    assert torch.equal(model.logit_scale, weights["logit_scale"].half().float())


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("visual.proj", None, "lacks visual_projection.weight"),
        ("visual.extra", torch.zeros(2), "also holds visual.extra"),
        ("ln_final.bias", torch.zeros(3), "has another shape of text_model.final_layer_norm.bias"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    name: str, change: torch.Tensor | None, told: str, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "open_clip_config.json").symlink_to(folder / "open_clip_config.json")
    weights = {**load_file(folder / WEIGHTS), name: change}
    save_file({key: x for key, x in weights.items() if x is not None}, tmp_path / WEIGHTS)

    with pytest.raises(ModelFilesError, match=f"not the CLIP that its config.*{told}"):
        load_open_clip(tmp_path)


def test_tokenizer_of_another_vocabulary_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    short = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (tmp_path / "vocab.json").write_text(json.dumps(short))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")

    with pytest.raises(ModelFilesError, match="ends texts with token 1, .* looks for 49407"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("torn", [WEIGHTS, "vocab.json"])
def test_torn_files_are_one_clear_error(torn: str, folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / torn).write_bytes(b"{torn")

    with pytest.raises(ModelFilesError, match="damaged weights|tokenizer in .* cannot be loaded"):
        load_clip(str(tmp_path))
