"""What a sweep needs from outside, and fetching it. Oracle: a fake hub's files and its log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from tiny_open_clip import save_open_clip

from dipgo_core import hub
from dipgo_core.zoo import zoo_path
from orchestrator.cli import main
from orchestrator.cli.prefetch import size_text

SWEEP = """
schema_version: 1
name: x
models: [{name: m, id: owner/tiny, family: sd}]
targets: [0.5]
search: {calibration: {prompts: {hub: owner/words, file: p.txt}}}
evaluate:
  prompts: {hub: owner/others, rows: 4}
  images: 4
  scorers: {features: inception-v3-compat, clip: owner/clip}
allow_unpinned: true
"""
Command = Callable[..., tuple[int, Any, str]]


def files_of(name: str) -> dict[str, bytes]:
    folder = zoo_path(name)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def command(
    tmp_path: Path,
    fake_hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Command:
    """Calls `dipgo-sweep NAME x.yaml --json ...`: exit code, document, what was said."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    fake_hub.put(
        "owner/tiny", {**files_of("tiny-sd"), "unet/x.bin": b"pickle"}, licence="openrail++"
    )
    fake_hub.put("owner/clip", {**files_of("tiny-clip"), "pytorch_model.bin": b"pickle"})
    fake_hub.put("owner/words", {"p.txt": b"a\nb\n", "large.bin": b"x"}, kind="dataset")
    fake_hub.put("owner/others", {"train.jsonl": b"{}"}, kind="dataset")
    (tmp_path / "x.yaml").write_text(SWEEP)

    def call(name: str, *options: str) -> tuple[int, Any, str]:
        with pytest.raises(SystemExit) as caught:
            main([name, str(tmp_path / "x.yaml"), *options])
        captured = capsys.readouterr()
        document = json.loads(captured.out) if "--json" in options and captured.out else None
        return int(caught.value.code or 0), document, captured.out + captured.err

    return call


def test_dry_run_lists_everything_and_fetches_no_weights(
    command: Command, fake_hub: FakeHub
) -> None:
    _, document, _ = command("prefetch", "--json", "--dry-run")
    tiny, clip, others, words = document["hub"]
    assert {file["path"]: file["bytes"] for file in clip["files"]} == {
        name: len(data)
        for name, data in files_of("tiny-clip").items()
        if name.endswith((".json", ".safetensors", ".txt"))
    }
    assert (tiny["licence"], tiny["gated"], tiny["used_by"]) == ("openrail++", False, ["m: id"])
    assert [file["path"] for file in words["files"]] == ["p.txt"]
    assert others["files"] == []
    assert document["bytes_to_fetch"] > 0
    assert set(fake_hub.downloads) == {"owner/tiny/model_index.json"}


def test_fetch_brings_each_file_once_and_no_pickle(command: Command, fake_hub: FakeHub) -> None:
    _, document, _ = command("prefetch", "--json")
    assert document["fetched"]
    assert set(fake_hub.downloads.values()) == {1}
    assert not [name for name in fake_hub.downloads if name.endswith(".bin")]
    before = dict(fake_hub.downloads)
    _, again, _ = command("prefetch", "--json")
    assert again["bytes_to_fetch"] == 0
    assert fake_hub.downloads == before


def test_fetched_sweep_is_complete_offline(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("prefetch")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _, document, _ = command("prefetch", "--json")
    assert (document["problems"], document["bytes_to_fetch"]) == ([], 0)


def test_clip_of_open_clip_is_fetched_with_its_vocabulary_and_complete_offline(
    command: Command, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "clip").mkdir()
    files = {path.name: path.read_bytes() for path in save_open_clip(tmp_path / "clip").iterdir()}
    pickle = {"open_clip_pytorch_model.bin": b"pickle"}
    timm = {"config.json": b'{"architecture": "vit"}', "model.safetensors": b"a tower of timm"}
    fake_hub.put("owner/clip", {**files, **pickle, **timm})
    _, document, _ = command("prefetch", "--json")
    clip = document["hub"][1]
    assert {file["path"] for file in clip["files"]} == set(files)
    assert fake_hub.downloads["owner/clip/open_clip_model.safetensors"] == 1
    assert not fake_hub.downloads["owner/clip/model.safetensors"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _, document, _ = command("prefetch", "--json")
    assert (document["problems"], document["bytes_to_fetch"]) == ([], 0)


def test_offline_says_what_is_missing_and_where_to_copy_it(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    command("prefetch", "--dry-run")  # the cache knows the commits now
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, said = command("prefetch")
    assert code == 2
    for folder in (hub.cache_folder("owner/words", "dataset"), hub.cache_folder("owner/clip")):
        assert f"copy {folder} from a machine that has it" in said
    assert "nothing was fetched" in said


def test_published_file_is_named_with_size_and_place(command: Command, tmp_path: Path) -> None:
    code, document, said = command("prefetch", "--json")
    (inception,) = document["elsewhere"]
    assert code == 2
    assert str(tmp_path / "torch" / "hub" / "checkpoints") in inception["problem"]
    assert "95,628,359 bytes" in inception["problem"]
    assert inception["problem"] in said


def test_gate_is_told_before_anything_is_fetched(
    command: Command, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.repos["model", "owner/clip"].gated = True
    code, document, said = command("prefetch", "--json")
    assert (code, document["fetched"], document["hub"][1]["readable"]) == (2, False, False)
    assert "owner/clip is gated: accept its terms at" in said
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert command("prefetch", "--json")[1]["fetched"]


def test_damaged_file_is_fetched_again(command: Command, fake_hub: FakeHub) -> None:
    command("prefetch")
    folder = hub.snapshot_folder("owner/clip", fake_hub.repos["model", "owner/clip"].main)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").resolve().write_bytes(whole[:-1])
    _, document, _ = command("prefetch", "--json")
    assert document["bytes_to_fetch"] == len(whole)
    assert (folder / "model.safetensors").read_bytes() == whole


def test_table_names_size_licence_and_access(command: Command) -> None:
    _, _, said = command("prefetch", "--dry-run", "-o", "evaluate.scorers.features=tiny-features")
    (row,) = [line for line in said.splitlines() if "owner/tiny" in line]
    assert all(word in row for word in ("model", "MB", "openrail++", "open", "main now"))


def test_pin_writes_what_it_says(command: Command, tmp_path: Path, fake_hub: FakeHub) -> None:
    _, listed, _ = command("pin", "--json", "--dry-run")
    assert not listed["written"]
    assert (tmp_path / "x.yaml").read_text() == SWEEP
    code, document, _ = command("pin", "--json")
    assert (code, document["written"], document["allow_unpinned_can_be_false"]) == (0, True, True)
    assert document["pinned"] == listed["pinned"]
    text = (tmp_path / "x.yaml").read_text()
    assert all(text.count(repo.main) == 1 for repo in fake_hub.repos.values())


def test_pin_of_a_broken_file_is_bad_usage(command: Command, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(SWEEP.replace("targets", "target"))
    assert command("pin")[0] == 2


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (95_628_359, "95.6 MB"), (5e11, "500 GB")],
)
def test_sizes_are_told_in_decimal_units(size: int, text: str) -> None:
    assert size_text(int(size)) == text


def test_plan_lists_what_is_not_here_yet(command: Command, fake_hub: FakeHub) -> None:
    _, before, _ = command("plan", "--json")
    asked = fake_hub.requests
    assert [line.partition(": no Inception")[0] for line in before["not_here"]] == [
        "m: id: owner/tiny",
        "m: evaluate.scorers.clip: owner/clip",
        "m: search.calibration.prompts: owner/words",
        "m: evaluate.scorers.features",
    ]
    assert asked == 0
    command("prefetch")
    _, after, _ = command("plan", "--json", "-o", "evaluate.scorers.features=tiny-features")
    assert after["not_here"] == []
