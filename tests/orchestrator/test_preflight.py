"""What a run checks before it spends anything. Oracle: a fake hub's commits, its log, its gate."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from tiny_open_clip import save_open_clip

from dipgo_core.errors import PreflightError
from dipgo_core.zoo import zoo_path
from orchestrator.cli import main
from orchestrator.facts import known_items
from orchestrator.hub_needs import hub_needs
from orchestrator.preflight import as_last_run, prepare
from orchestrator.sweep_file import SweepFile, load_sweep

SWEEP = """
schema_version: 1
name: x
models: [{name: m, id: owner/tiny, family: sd}]
targets: [0.5]
search: {calibration: {prompts: bundled:calibration}}
evaluate:
  prompts: {hub: owner/words, file: p.txt}
  images: 4
  scorers: {features: tiny-features, clip: owner/clip}
allow_unpinned: true
"""


def files_of(name: str) -> dict[str, bytes]:
    folder = zoo_path(name)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def open_clip_files(folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    return {path.name: path.read_bytes() for path in save_open_clip(folder).iterdir()}


@pytest.fixture
def sweep(tmp_path: Path, fake_hub: FakeHub) -> SweepFile:
    fake_hub.put("owner/tiny", files_of("tiny-sd"))
    fake_hub.put("owner/clip", files_of("tiny-clip"))
    fake_hub.put("owner/words", {"p.txt": b"a\nb\nc\nd\n"}, kind="dataset")
    (tmp_path / "x.yaml").write_text(SWEEP)
    return load_sweep(tmp_path / "x.yaml")


def test_everything_from_the_hub_is_found(sweep: SweepFile) -> None:
    assert [(need.kind, need.id, need.users) for need in hub_needs(sweep)] == [
        ("model", "owner/tiny", ("m: id",)),
        ("scorer", "owner/clip", ("m: evaluate.scorers.clip",)),
        ("prompts", "owner/words", ("m: evaluate.prompts",)),
    ]


def test_branches_become_the_commits_that_they_are(sweep: SweepFile, fake_hub: FakeHub) -> None:
    ready = prepare(sweep)
    tiny, clip, words = (repo.main for repo in fake_hub.repos.values())
    model, facts = ready.sweep.models[0], ready.facts["m"]
    assert model.settings.revision == tiny
    assert model.evaluate.scorers.clip == f"owner/clip@{clip}"
    assert model.evaluate.prompts.revision == words
    assert facts.weights_sha256 == f"hub:owner/tiny@{tiny}"
    assert facts.scorers["clip"].digest == f"hub:owner/clip@{clip}"


def test_moved_branch_is_another_model_and_is_told(
    sweep: SweepFile, fake_hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    first = prepare(sweep)
    moved = fake_hub.put("owner/tiny", {**files_of("tiny-sd"), "README.md": b"new"})
    with caplog.at_level(logging.WARNING):
        second = prepare(sweep, last={"commits": first.commits})
    assert second.facts["m"].weights_sha256 == f"hub:owner/tiny@{moved}"
    assert second.facts["m"].weights_sha256 != first.facts["m"].weights_sha256
    assert f"main of owner/tiny moved from {first.commits['model:owner/tiny@main'][:12]}" in (
        caplog.text
    )


def test_read_commands_take_the_commits_of_the_last_run(
    sweep: SweepFile, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = prepare(sweep)
    fake_hub.put("owner/tiny", {"README.md": b"new"})
    asked = fake_hub.requests
    resolved, facts = as_last_run(sweep, json.loads(json.dumps({"commits": ready.commits})))
    assert resolved == ready.sweep
    assert facts["m"].weights_sha256 == ready.facts["m"].weights_sha256
    assert fake_hub.requests == asked


def test_model_that_nobody_knows_is_as_large_as_its_configs_say(
    sweep: SweepFile, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert as_last_run(sweep, {})[1]["m"].height == 512  # of its family: nothing was fetched yet
    ready = prepare(sweep)
    assert (ready.facts["m"].height, ready.facts["m"].width) == (32, 32)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another machine"))
    last = {"commits": ready.commits, "items": known_items(ready.sweep, ready.facts)}
    assert as_last_run(sweep, json.loads(json.dumps(last)))[1]["m"].height == 32


def test_denoiser_alone_on_the_hub_says_the_size_of_its_images(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_of("tiny-sd")
    alone = {name.removeprefix("unet/"): data for name, data in files.items() if "unet/" in name}
    config = {**json.loads(alone["config.json"]), "sample_size": 24}
    fake_hub.put("owner/unet", {**alone, "config.json": json.dumps(config).encode()})
    fake_hub.put("owner/tiny", files)
    fake_hub.put("owner/words", {"p.txt": b"a\nb\nc\nd\n"}, kind="dataset")
    text = SWEEP.replace("id: owner/tiny", "id: owner/unet, base: owner/tiny")
    (tmp_path / "x.yaml").write_text(text.replace("clip: owner/clip", "clip: tiny-clip"))
    ready = prepare(load_sweep(tmp_path / "x.yaml"))
    assert ready.facts["m"].height == 96  # a latent is 4 pixels
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another machine"))
    last = {"commits": ready.commits, "items": known_items(ready.sweep, ready.facts)}
    read = load_sweep(tmp_path / "x.yaml")
    assert as_last_run(read, json.loads(json.dumps(last)))[1]["m"].height == 96


def test_labels_of_a_hub_model_are_those_it_names(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.put("owner/dit", files_of("tiny-dit"))
    text = "schema_version: 1\nname: x\nmodels: [{id: owner/dit, family: dit, name: m}]\n"
    scorers = "evaluate: {images: 8, scorers: {features: tiny-features}}\n"
    (tmp_path / "x.yaml").write_text(f"{text}targets: [0.5]\n{scorers}allow_unpinned: true\n")
    sweep = load_sweep(tmp_path / "x.yaml")
    ready = prepare(sweep)
    index = json.loads((zoo_path("tiny-dit") / "model_index.json").read_text())
    items = ready.facts["m"].test.items or ()
    assert {item.prompt for item in items} <= {
        text.strip() for names in index["id2label"].values() for text in names.split(",")
    }
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another machine"))
    last = {"commits": ready.commits, "items": known_items(ready.sweep, ready.facts)}
    found = as_last_run(sweep, json.loads(json.dumps(last)))[1]["m"]
    assert found.test.sha256 == ready.facts["m"].test.sha256


def test_everything_that_is_missing_offline_is_told_at_once(
    sweep: SweepFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PreflightError) as caught:
        prepare(sweep)
    lines = str(caught.value).splitlines()
    assert lines[0] == "x cannot be run, 3 problems:"
    for line, name in zip(lines[1:], ("owner/tiny", "owner/clip", "owner/words"), strict=True):
        assert f"revision main of {name} cannot be read" in line
        assert "HF_HUB_OFFLINE is set" in line


def test_scorer_that_is_not_in_the_cache_is_refused_offline(
    sweep: SweepFile, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(sweep)  # knows all commits now, and has fetched prompts and the index only
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PreflightError) as caught:
        prepare(sweep)
    assert "m: evaluate.scorers.clip: owner/clip" in str(caught.value)
    assert "m: id: owner/tiny" in str(caught.value)


def test_gated_model_is_refused_without_access(
    sweep: SweepFile, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.repos["model", "owner/clip"].gated = True
    with pytest.raises(PreflightError, match=r"scorers.clip: owner/clip is gated: .*none is set"):
        prepare(sweep)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert prepare(sweep).facts


def test_hub_model_of_pickles_is_refused_before_it_is_fetched(
    sweep: SweepFile, fake_hub: FakeHub
) -> None:
    fake_hub.put("owner/clip", {"config.json": b"{}", "pytorch_model.bin": b"p"})
    with pytest.raises(PreflightError, match=r"owner/clip at .* has no model.safetensors"):
        prepare(sweep)
    assert not [name for name in fake_hub.downloads if name.startswith("owner/clip")]


def test_missing_inception_is_told_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = "schema_version: 1\nname: x\nmodels: [tiny-sd]\ntargets: [0.5]\n"
    (tmp_path / "x.yaml").write_text(
        text + "evaluate: {images: 8, scorers: {features: inception-v3-compat}}\n"
    )
    with pytest.raises(PreflightError, match=r"evaluate.scorers.features: no Inception weights"):
        prepare(load_sweep(tmp_path / "x.yaml"))


def test_folder_without_a_network_is_told_with_the_rest(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("a\n")
    text = "schema_version: 1\nname: x\nmodels: [tiny-sd]\ntargets: [0.5]\n"
    evaluate = "evaluate: {images: 8, prompts: short.txt, scorers: {clip: empty}}\n"
    (tmp_path / "x.yaml").write_text(text + evaluate)
    with pytest.raises(PreflightError, match=r"2 problems:[\s\S]*clip: no network in .*empty"):
        prepare(load_sweep(tmp_path / "x.yaml"))


def test_clip_of_open_clip_is_checked_before_its_weights_are_fetched(
    sweep: SweepFile, fake_hub: FakeHub, tmp_path: Path
) -> None:
    files = open_clip_files(tmp_path / "clip")
    commit = fake_hub.put("owner/clip", files)
    assert prepare(sweep).facts["m"].scorers["clip"].digest == f"hub:owner/clip@{commit}"
    assert not fake_hub.downloads["owner/clip/open_clip_model.safetensors"]


def test_clip_that_open_clip_alone_can_build_is_refused(
    sweep: SweepFile, fake_hub: FakeHub, tmp_path: Path
) -> None:
    files = open_clip_files(tmp_path / "clip")
    config = {"model_cfg": {"custom_text": True, "vision_cfg": {}, "text_cfg": {}}}
    fake_hub.put("owner/clip", {**files, "open_clip_config.json": json.dumps(config).encode()})
    with pytest.raises(PreflightError, match=r"scorers.clip: .*model_cfg.custom_text is True"):
        prepare(sweep)
    assert not fake_hub.downloads["owner/clip/open_clip_model.safetensors"]


def small_sets(tmp_path: Path) -> Path:
    (tmp_path / "few.txt").write_text("x\ny\nx\n")
    file = tmp_path / "few.yaml"
    file.write_text(
        "schema_version: 1\nname: few\nmodels: [tiny-sd]\ntargets: [0.5]\n"
        "search: {calibration: {prompts: few.txt, images: 5}}\n"
        "evaluate: {metrics: [psnr], images: 4}\n"
    )
    return file


def test_a_run_tells_of_repeated_and_of_too_few_prompts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prepare(load_sweep(small_sets(tmp_path)))
    assert [record.getMessage().partition(", ")[0] for record in caplog.records] == [
        "tiny-sd-ddim-10: search.calibration.prompts: 1 of 3 items repeat an earlier one and are "
        "left out",
        "tiny-sd-ddim-10: search.calibration.prompts: 2 items for 5 calibration images",
    ]


def test_validate_tells_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["validate", str(small_sets(tmp_path))])
    told = " ".join(capsys.readouterr().err.split())
    assert caught.value.code == 0
    assert "1 of 3 items repeat an earlier one" in told and "up to 3 times" in told
