"""Which files a model consists of. Oracles: the bundled models' folders, and a fake hub's log."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
from fake_hub import FakeHub
from huggingface_hub import constants
from single_file import write_single_file
from tiny import tiny_sd

from dipgo_core.config import ModelSettings
from dipgo_core.errors import HubError, HubUnreachableError, ModelFilesError
from dipgo_core.model_files import (
    absent_shards,
    file_sha256,
    hub_network_files,
    hub_pipeline,
    model_index,
    network_files,
    pipeline_files,
    weights_digest,
)
from dipgo_core.pipelines import load_model
from dipgo_core.zoo import zoo_path

UNET = "unet/diffusion_pytorch_model-00001-of-00002.safetensors"


def tiny_sd_files() -> dict[str, bytes]:
    folder = zoo_path("tiny-sd")
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(zoo_path("tiny-sd"), tmp_path / "copy"))


def test_variants_pickles_and_the_safety_checker_are_left_out() -> None:
    names = set(tiny_sd_files())
    index = {**model_index(zoo_path("tiny-sd")), "safety_checker": ["x", "Y"]}
    others = {
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "v1-5-pruned.safetensors",
    }
    files = pipeline_files(index, names | others)
    assert set(files.loaded) == {name for name in names if not name.endswith(".md")}
    assert files.missing == ()


def test_missing_parts_are_all_named() -> None:
    names = set(tiny_sd_files()) - {UNET, "vae/diffusion_pytorch_model.safetensors"}
    files = pipeline_files(model_index(zoo_path("tiny-sd")), names)
    assert files.missing == (UNET, "vae/*.safetensors")


def test_absent_shards_are_read_from_the_names_of_others() -> None:
    assert absent_shards(["u/m-00002-of-00003.safetensors", "u/other.safetensors"]) == [
        "u/m-00001-of-00003.safetensors",
        "u/m-00003-of-00003.safetensors",
    ]


@pytest.mark.parametrize("change", [-1, 1])
def test_weights_of_another_size_than_their_header_says_are_refused(
    tiny_copy: Path, change: int
) -> None:
    data = (tiny_copy / UNET).read_bytes()
    (tiny_copy / UNET).write_bytes(data[:change] if change < 0 else data + b"\0")
    with pytest.raises(ModelFilesError, match=r"damaged weights: .*00001-of-00002.safetensors \("):
        weights_digest(ModelSettings(id=str(tiny_copy)))


def test_all_damaged_files_are_named_at_once(tiny_copy: Path) -> None:
    (tiny_copy / UNET).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (tiny_copy / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFilesError, match=r"unet/.*; .*vae/"):
        weights_digest(ModelSettings(id=str(tiny_copy)))


def index_of(folder: Path, **changed: object) -> None:
    file = folder / "model_index.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **changed}), "utf-8")


@pytest.mark.parametrize(
    ("change", "decides"),
    [
        ({"force_zeros_for_empty_prompt": False}, True),
        ({"_class_name": "StableDiffusionImg2ImgPipeline"}, True),
        ({"_diffusers_version": "0.1", "_name_or_path": "elsewhere"}, False),
        ({"id2label": {"0": "cat"}, "requires_safety_checker": True}, False),
    ],
)
def test_settings_of_the_pipeline_that_decide_images_are_in_its_digests(
    tiny_copy: Path, change: dict[str, object], decides: bool
) -> None:
    network = str(tiny_copy / "text_encoder")
    told = [ModelSettings(id=str(tiny_copy)), ModelSettings(id=network, base=str(tiny_copy))]
    write_single_file(tiny_sd(), tiny_copy.parent / "one.safetensors")
    told.append(ModelSettings(id=f"{tiny_copy.parent}/one.safetensors", base=str(tiny_copy)))
    before = [weights_digest(settings) for settings in told]
    index_of(tiny_copy, **change)
    after = [weights_digest(settings) for settings in told]
    assert [a != b for a, b in zip(before, after, strict=True)] == [decides] * 3


@pytest.mark.parametrize("origin", [["diffusers"], [], ["diffusers", 3], ["a", "B", "C"]])
def test_component_that_is_no_pair_of_library_and_class_is_refused(
    tiny_copy: Path, origin: list[object]
) -> None:
    index_of(tiny_copy, vae=origin)
    with pytest.raises(ModelFilesError, match=r"as vae; a component is a library and a class"):
        load_model(ModelSettings(id=str(tiny_copy)))


def test_hub_model_is_loaded_at_its_commit_from_the_files_it_needs(fake_hub: FakeHub) -> None:
    files = tiny_sd_files()
    commit = fake_hub.put("owner/tiny", {**files, "unet/diffusion_pytorch_model.bin": b"pickle"})
    model = load_model(ModelSettings(id="owner/tiny"))
    assert model.weights_sha256 == f"hub:owner/tiny@{commit}"
    assert model.settings.revision == commit
    assert not [name for name in fake_hub.downloads if name.endswith((".bin", ".md"))]


def test_fetched_hub_model_needs_no_network(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake_hub.put("owner/tiny", tiny_sd_files())
    folder = hub_pipeline(ModelSettings(id="owner/tiny"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_pipeline(ModelSettings(id="owner/tiny", revision=commit)) == folder
    with pytest.raises(HubUnreachableError, match=r"owner/other .*HF_HUB_OFFLINE"):
        hub_pipeline(ModelSettings(id="owner/other", revision=commit))


def test_hub_model_without_safetensors_is_refused_before_weights_are_fetched(
    fake_hub: FakeHub,
) -> None:
    pickles = {
        name.replace(".safetensors", ".bin"): data
        for name, data in tiny_sd_files().items()
        if "index.json" not in name or name == "model_index.json"
    }
    fake_hub.put("owner/pickled", pickles)
    with pytest.raises(HubError, match=r"owner/pickled at .* has no text_encoder/\*.safetensors"):
        hub_pipeline(ModelSettings(id="owner/pickled"))
    assert fake_hub.downloads == {"owner/pickled/model_index.json": 1}


TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "vocab.json": b"{}"}
OPEN_CLIP = {
    "open_clip_config.json": b"{}",
    "open_clip_model.safetensors": b"weights",
    "open_clip_pytorch_model.bin": b"pickle",
    "README.md": b"",
    "preprocessor_config.json": b"{}",
    **TOKENIZER,
}
TAKEN = {"open_clip_config.json", "open_clip_model.safetensors", *TOKENIZER}


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"config.json": b'{"model_type": "clip"}', "pytorch_model.bin": b"pickle"},
        {"config.json": b'{"architecture": "vit"}', "model.safetensors": b"timm's"},
    ],
    ids=["alone", "beside pickles of transformers", "beside a tower of timm"],
)
def test_clip_of_open_clip_is_taken_where_transformers_has_none(
    others: dict[str, bytes], fake_hub: FakeHub
) -> None:
    commit = fake_hub.put("owner/clip", {**OPEN_CLIP, **others})
    assert set(hub_network_files("owner/clip", commit).loaded) == TAKEN
    assert set(fake_hub.downloads) <= {"owner/clip/config.json"}


def test_clip_that_both_saved_is_that_of_transformers(fake_hub: FakeHub) -> None:
    theirs = {"config.json": b'{"model_type": "clip"}', "model.safetensors": b"weights"}
    commit = fake_hub.put("owner/clip", {**OPEN_CLIP, **theirs})
    loaded = set(hub_network_files("owner/clip", commit).loaded)
    assert {"config.json", "model.safetensors"} <= loaded
    assert "open_clip_model.safetensors" not in loaded


def test_clip_of_pickles_alone_is_refused_with_the_way_out(fake_hub: FakeHub) -> None:
    files = {name: data for name, data in OPEN_CLIP.items() if name[-11:] != "safetensors"}
    commit = fake_hub.put("owner/clip", files)
    with pytest.raises(HubError, match=r"has no open_clip_model\.safetensors.*save_file\(torch"):
        hub_network_files("owner/clip", commit)
    assert not fake_hub.downloads


def test_clip_of_open_clip_without_a_vocabulary_lacks_it(tmp_path: Path) -> None:
    names = set(OPEN_CLIP) - {"tokenizer.json"}
    assert network_files(names, tmp_path).missing == ("tokenizer.json",)
    assert network_files({*names, "merges.txt"}, tmp_path).missing == ()


@pytest.mark.parametrize(("age", "reads"), [(60, 1), (0, 2)])
def test_settled_file_is_digested_once(tmp_path: Path, monkeypatch, age: int, reads: int) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    then = time.time() - age
    os.utime(tmp_path / "weights", (then, then))
    seen: list[object] = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *given: seen.append(1) or digest(*given))

    found = {file_sha256(tmp_path / "weights") for _ in range(2)}

    assert found == {hashlib.sha256(b"weights").hexdigest()}
    assert len(seen) == reads


def test_changed_file_is_digested_again(tmp_path: Path) -> None:
    for age, text in ((60, b"old"), (50, b"new")):
        (tmp_path / "weights").write_bytes(text)
        os.utime(tmp_path / "weights", (time.time() - age,) * 2)
        assert file_sha256(tmp_path / "weights") == hashlib.sha256(text).hexdigest()


def test_unreadable_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match="cannot read .*nothing"):
        file_sha256(tmp_path / "nothing")
