"""The model hub. Oracle: a fake hub on loopback, what it was asked for and what it was given."""

from __future__ import annotations

import shutil

import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants

from dipgo_core import hub
from dipgo_core.errors import HubError, HubUnreachableError

FILES = {"config.json": b"{}", "model.safetensors": b"w" * 100, "pytorch_model.bin": b"p" * 100}
NOWHERE = "http://127.0.0.1:9"  # the discard port: nobody listens


def test_id_and_revision_are_split() -> None:
    assert hub.split_id("owner/name@v1") == ("owner/name", "v1")
    assert hub.split_id("owner/name") == ("owner/name", None)


def test_branch_resolves_to_what_it_is_now(fake_hub: FakeHub) -> None:
    first = fake_hub.put("owner/name", FILES)
    assert hub.resolve_commit("owner/name") == first
    second = fake_hub.put("owner/name", {**FILES, "config.json": b"[]"})
    assert hub.resolve_commit("owner/name", "main") == second != first


def test_commit_is_resolved_without_asking(fake_hub: FakeHub) -> None:
    assert hub.resolve_commit("owner/name", "a" * 40) == "a" * 40
    assert fake_hub.requests == 0


def test_offline_branch_is_what_the_cache_last_saw(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake_hub.put("owner/name", FILES, kind="dataset")
    hub.resolve_commit("owner/name", None, "dataset")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.resolve_commit("owner/name", None, "dataset") == commit
    with pytest.raises(HubUnreachableError, match=r"revision v2 of owner/name .*HF_HUB_OFFLINE"):
        hub.resolve_commit("owner/name", "v2", "dataset")


def test_unreachable_hub_says_what_to_copy(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    with pytest.raises(HubUnreachableError, match=r"prefetch.*copy .*models--owner--name"):
        hub.resolve_commit("owner/name")


def test_repository_tells_sizes_licence_and_gate(fake_hub: FakeHub) -> None:
    commit = fake_hub.put("owner/name", FILES, gated=True, licence="openrail++")
    found = hub.look_up("owner/name", commit)
    assert found.files == {name: len(data) for name, data in FILES.items()}
    assert (found.licence, found.gated, found.commit) == ("openrail++", True, commit)


def test_only_asked_files_are_fetched_and_only_once(fake_hub: FakeHub) -> None:
    commit = fake_hub.put("owner/name", FILES)
    wanted = ["config.json", "model.safetensors"]
    folder = hub.fetch("owner/name", commit, wanted)
    asked = fake_hub.requests
    assert hub.fetch("owner/name", commit, wanted) == folder
    assert fake_hub.requests == asked
    assert fake_hub.downloads == {"owner/name/config.json": 1, "owner/name/model.safetensors": 1}
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name: FILES[name] for name in wanted
    }


def test_fetched_files_are_known_offline(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake_hub.put("owner/name", FILES)
    hub.fetch("owner/name", commit, ["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert set(hub.files_at("owner/name", commit)) == set(FILES)
    assert set(hub.cached_files("owner/name", commit)) == {"config.json"}
    with pytest.raises(HubUnreachableError, match=r"lacks model.safetensors in .*HF_HUB_OFFLINE"):
        hub.fetch("owner/name", commit, ["config.json", "model.safetensors"])


def test_copied_snapshot_without_listing_is_taken_as_it_is(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.snapshot_folder("owner/name", "b" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub.files_at("owner/name", "b" * 40) == {"config.json": 2}


def test_gated_repository_needs_a_token_with_access(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = fake_hub.put("owner/name", FILES, gated=True)
    assert not hub.may_read("owner/name")
    with pytest.raises(HubError, match=r"gated: accept its terms at .*/owner/name, .*none is set"):
        hub.fetch("owner/name", commit, ["config.json"])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub.may_read("owner/name")
    assert hub.fetch("owner/name", commit, ["config.json"]).is_dir()


@pytest.mark.parametrize(
    ("repo_id", "revision", "message"),
    [
        ("owner/other", "main", "the hub has no model owner/other, or it is private"),
        ("owner/name", "v9", "revision v9 of owner/name does not exist"),
    ],
)
def test_unknown_name_or_revision_is_said(
    fake_hub: FakeHub, repo_id: str, revision: str, message: str
) -> None:
    fake_hub.put("owner/name", FILES)
    with pytest.raises(HubError, match=message):
        hub.resolve_commit(repo_id, revision)


def test_file_that_the_commit_lacks_is_named(fake_hub: FakeHub) -> None:
    commit = fake_hub.put("owner/name", FILES)
    with pytest.raises(HubError, match=r"owner/name has no vocab.json at commit"):
        hub.fetch("owner/name", commit, ["config.json", "vocab.json"])


def test_damaged_file_is_fetched_again(fake_hub: FakeHub) -> None:
    commit = fake_hub.put("owner/name", FILES)
    path = hub.fetch("owner/name", commit, ["config.json"]) / "config.json"
    shutil.copy(path.resolve(), path.with_name("copy"))
    path.resolve().write_bytes(b"torn, and longer")
    hub.fetch_again("owner/name", commit, "config.json")
    assert path.read_bytes() == b"{}"
