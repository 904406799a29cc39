"""The bundled models load through stock classes, are small, and know what they were taught."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTPipeline, StableDiffusionPipeline
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor

from dipgo_core import zoo
from dipgo_core.errors import UnknownModelError
from dipgo_core.zoo import ZOO_MODELS, captions, reference_statistics_path, zoo_path
from dipgo_core.zoo.features import FEATURE_DIM, TinyFeatures

ZOO_DIR = Path(zoo.__file__).parent
QUALITY_FILE = Path(__file__).parents[3] / "benchmarks" / "zoo" / "dense_quality.json"


@pytest.fixture(scope="module")
def quality() -> dict[str, Any]:
    """The measured figures that the card quotes."""
    return json.loads(QUALITY_FILE.read_text("utf-8"))


@pytest.fixture(scope="module")
def clip() -> tuple[CLIPModel, CLIPProcessor]:
    folder = zoo_path("tiny-clip")
    return CLIPModel.from_pretrained(folder).eval(), CLIPProcessor.from_pretrained(folder)


def every_caption() -> list[str]:
    return sorted(captions("calibration") + captions("test"))


def caption_accuracy(
    clip: tuple[CLIPModel, CLIPProcessor], images: list[Any], wanted: list[str]
) -> float:
    """Returns the share of images for which tiny-clip prefers the wanted one of all captions."""
    model, processor = clip
    texts = every_caption()
    inputs = processor(text=texts, images=images, return_tensors="pt", padding="longest")
    with torch.no_grad():
        best = model(**inputs).logits_per_image.argmax(dim=-1).tolist()
    return sum(texts[i] == text for i, text in zip(best, wanted, strict=True)) / len(wanted)


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_zoo_import_loads_no_torch() -> None:
    code = "import sys, dipgo_core.zoo; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_zoo_path_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(UnknownModelError, match="tiny-sd, tiny-dit, tiny-clip, tiny-features"):
        zoo_path("tiny-sdxl")


@pytest.mark.parametrize("name", ZOO_MODELS)
def test_zoo_path_is_a_folder(name: str) -> None:
    assert zoo_path(name).is_dir()


def test_captions_splits_are_disjoint_and_balanced() -> None:
    calibration, test = captions("calibration"), captions("test")
    assert (len(calibration), len(test)) == (180, 100)
    assert len({*calibration, *test}) == 280
    garments = [text.split()[2] for text in test]
    assert {garments.count(garment) for garment in garments} == {10}


def test_captions_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="'calibration' or 'test'"):
        captions("train")  # type: ignore[arg-type]


def test_package_data_is_small_and_free_of_pickles() -> None:
    files = [path for path in ZOO_DIR.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    sizes = [path.stat().st_size for path in files]
    assert sum(sizes) <= 25_000_000
    assert max(sizes) < 8_000_000
    assert {path.suffix for path in files} <= {".py", ".json", ".safetensors", ".txt", ".md"}


def test_reference_statistics_fit_the_shipped_extractor() -> None:
    facts = json.loads(reference_statistics_path().with_suffix(".json").read_text("utf-8"))
    weights = zoo_path("tiny-features") / "model.safetensors"
    assert facts["extractor_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    stored = reference_statistics_path().read_bytes()
    assert facts["statistics_sha256"] == hashlib.sha256(stored).hexdigest()
    tensors = load_file(reference_statistics_path())
    assert tensors["features"].shape == (10_000, FEATURE_DIM)
    torch.testing.assert_close(tensors["features"].double().mean(dim=0), tensors["mean"])


@pytest.mark.parametrize("size", [32, 64])
def test_features_take_uint8_images_of_any_size(size: int) -> None:
    model = TinyFeatures.from_pretrained(zoo_path("tiny-features"))
    images = torch.randint(256, (3, 3, size, size), dtype=torch.uint8)
    features = model(images)
    assert features.shape == (3, FEATURE_DIM)
    assert features.dtype == torch.float32


def test_tiny_clip_accuracy_on_held_out_images(quality: dict[str, Any]) -> None:
    held_out = quality["scorers"]["held_out"]
    assert held_out["n"] == 10_000
    assert held_out["accuracy_clip"] >= 0.80


def test_tiny_sd_accuracy_at_ten_steps(quality: dict[str, Any]) -> None:
    rows = [row for row in quality["tiny-sd"]["curve"] if row["steps"] == 10]
    assert max(row["accuracy_clip"] for row in rows) >= 0.90


def test_tiny_sd_draws_what_the_caption_says(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(zoo_path("tiny-sd"))
    pipe.set_progress_bar_config(disable=True)
    texts = list(captions("test")[::5])
    images = pipe(
        texts, num_inference_steps=10, guidance_scale=3.0, generator=generators(len(texts))
    ).images
    assert images[0].size == (32, 32)
    assert caption_accuracy(clip, images, texts) >= 0.7


def test_tiny_dit_draws_what_its_label_says(clip: tuple[CLIPModel, CLIPProcessor]) -> None:
    pipe = DiTPipeline.from_pretrained(zoo_path("tiny-dit"))
    pipe.set_progress_bar_config(disable=True)
    texts = list(captions("test")[::5])
    assert sorted(pipe.labels) == every_caption()
    images = pipe(
        pipe.get_label_ids(texts),
        num_inference_steps=10,
        guidance_scale=3.0,
        generator=generators(len(texts)),
    ).images
    assert caption_accuracy(clip, images, texts) >= 0.7
