"""SubNet files: round trip, refusals, and no half-written file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_hub import TOKEN, FakeHub
from huggingface_hub import constants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dipgo_core.errors import HubError, HubUnreachableError, SubNetError
from dipgo_core.gates import GateTable
from dipgo_core.graph import Reuse
from dipgo_core.subnet import SubNet, config_sha256


def small_subnet() -> SubNet:
    config: dict[str, Any] = {"sample_size": 8, "widths": [1, 2]}
    return SubNet(
        gates=GateTable.from_strings(["11", "10"]),
        block_names=("", "mid_block"),
        reuse=(Reuse.SKIP, Reuse.OUTPUT),
        granularity="block",
        model={
            "family": "sd",
            "id": "m",
            "denoiser": "UNet2DConditionModel",
            "config": config,
            "config_sha256": config_sha256(config),
        },
        sampler={
            "scheduler": "DDIMScheduler",
            "config": {},
            "config_sha256": config_sha256({}),
            "steps": 2,
            "timesteps": [501, 1],
            "guidance_scale": 4.0,
        },
        macs={"dense": 2, "kept": 1, "pruned_ratio": 0.5, "convention": "all"},
        provenance={"seed": 0},
    )


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    subnet = small_subnet()
    subnet.save(tmp_path / "subnet.json")
    assert SubNet.load(tmp_path / "subnet.json") == subnet
    assert [path.name for path in tmp_path.iterdir()] == ["subnet.json"]


def test_call_kwargs_give_steps_and_guidance() -> None:
    assert small_subnet().call_kwargs() == {"num_inference_steps": 2, "guidance_scale": 4.0}


def test_config_sha256_ignores_private_keys_order_and_tuples() -> None:
    one = config_sha256({"a": (1, 2), "b": None, "_class_name": "X"})
    assert one == config_sha256({"b": None, "a": [1, 2]}) != config_sha256({"a": [1, 2]})


def edited(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(json.dumps(small_subnet().to_json()))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(kind="x"), "is not a SubNet file"),
        (lambda d: d.update(schema_version=2), "schema_version 2, this dipgo-sweep reads 1"),
        (lambda d: d.update(schema_version=True), "schema_version True, this dipgo-sweep reads 1"),
        (lambda d: d.pop("keep"), "keep must be a list of strings .* got nothing: it is missing"),
        (lambda d: d.update(keep=["11"]), "1 entries"),
        (lambda d: d.update(keep=["11", "1"]), "all of one length"),
        (lambda d: d.update(keep=["11", "x1"]), "0 and 1"),
        (lambda d: d.update(keep=7), "keep must be a list of strings .* got 7"),
        (lambda d: d.update(keep=["01", "11"]), "first call must compute every block"),
        (lambda d: d["blocks"].pop(), "blocks has 1 names"),
        (lambda d: d["blocks"][1].update(reuse="maybe"), "blocks must be a list"),
        (lambda d: d["blocks"][0].update(name="x"), "blocks must be a list"),
        (lambda d: d["blocks"][1].update(reuse=[]), "blocks must be a list"),
        (lambda d: d["model"]["config"].update(sample_size=9), "does not match"),
        (lambda d: d["sampler"].pop("config_sha256"), r"sampler\.config_sha256 must be a text"),
        (lambda d: d.update(model=[]), r"model must be an object, got \[\]"),
        (lambda d: d["sampler"].pop("timesteps"), r"sampler\.timesteps must be a list"),
        (lambda d: d["sampler"].update(steps=True), r"sampler\.steps must be a whole number"),
        (lambda d: d["sampler"].update(guidance_scale=float("nan")), "a finite number, got nan"),
        (lambda d: d["sampler"].update(custom={"x": [1]}), r"sampler\.custom must be an object"),
        (lambda d: d["macs"].update(kept="many"), r"macs\.kept must be a whole number"),
        (lambda d: d["macs"].update(kept=0), r"macs\.kept must be from 1 to .*, got 0 of 2"),
        (lambda d: d["macs"].update(kept=3), r"macs\.kept must be from 1 to .*, got 3 of 2"),
        (
            lambda d: d["macs"].update(dense=2000, kept=1500),
            "pruned_ratio is 0.5, but .* kept: 0.25",
        ),
        (lambda d: d["macs"].update(paper={"dense": 2}), r"macs\.paper\.kept must be a whole"),
        (
            lambda d: d["macs"].update(paper={"dense": 2, "kept": 0, "pruned_ratio": 1}),
            r"macs\.paper\.kept must be from 1",
        ),
        (lambda d: d.update(keep=["11", "00"]), "rows of keep .* keep_sha256 says .* edited"),
        (lambda d: d["sampler"].update(steps=3), r"sampler\.steps is 3, .* 3 calls, .* 2 entries"),
    ],
)
def test_from_json_refuses_broken_documents(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(SubNetError, match=message) as caught:
        SubNet.from_json(edited(change), source="x.json")
    assert str(caught.value).startswith("x.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A SubNet file in which one value anywhere is replaced, taken out, or put in."""
    data: Any = edited(lambda d: None)
    node = data
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = draw(st.sampled_from(keys)) if keys else None
        if key is not None and isinstance(node[key], dict | list) and draw(st.booleans()):
            node = node[key]
            continue
        break
    change = draw(st.sampled_from(["replace", "remove", "add"]))
    if change == "remove" and key is not None:
        del node[key]
    elif change == "replace" and key is not None:
        node[key] = draw(JSON)
    elif isinstance(node, dict):
        node[draw(st.text(max_size=5))] = draw(JSON)
    else:
        node.append(draw(JSON))
    return dict(data)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=documents())
def test_an_edited_file_is_read_whole_or_refused_in_one_error(
    data: dict[str, Any], tmp_path: Path
) -> None:
    """What is read is what the file says: saved again, it is the same document."""
    path = tmp_path / "edited.json"
    path.write_text(json.dumps(data))
    try:
        subnet = SubNet.load(path)
    except SubNetError as error:
        assert str(error).startswith(f"{path}")
        assert any(move in str(error) for move in ("export", "install"))
    else:
        told = json.loads(json.dumps(subnet.to_json()))
        data["blocks"] = [{name: b[name] for name in ("name", "reuse")} for b in data["blocks"]]
        given = {name: data[name] for name in told if name in data}  # others are not read
        assert str(given) == str({name: told[name] for name in given})
        subnet.call_kwargs()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 0.999))
def test_a_truncated_file_is_refused(share: float, tmp_path: Path) -> None:
    text = json.dumps(small_subnet().to_json())
    path = tmp_path / "cut.json"
    path.write_text(text[: int(share * len(text))])
    with pytest.raises(SubNetError, match=r"cut\.json is not JSON .* truncated: export it again"):
        SubNet.load(path)


def test_files_that_noted_no_digest_of_keep_are_read() -> None:
    assert SubNet.from_json(edited(lambda d: d.pop("keep_sha256"))) == small_subnet()


def test_a_mistyped_file_name_is_no_repository() -> None:
    with pytest.raises(SubNetError, match="results/subnet.json is no file"):
        SubNet.from_pretrained("results/subnet.json")


def test_from_json_refuses_what_is_no_object() -> None:
    with pytest.raises(SubNetError, match="not a SubNet file"):
        SubNet.from_json([1])


@pytest.mark.parametrize("content", [b'{"kind": "dipgo.sub', b"\xff\xfe", b"", b"[" * 10**5])
def test_load_refuses_truncated_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(SubNetError, match="not JSON"):
        SubNet.load(path)


def test_load_says_how_to_get_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SubNetError, match="dipgo-sweep export"):
        SubNet.load(tmp_path / "none.json")


def test_load_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(SubNetError, match="cannot be read"):
        SubNet.load(tmp_path)


# the hub ------------------------------------------------------------------------------------------


def test_what_is_pushed_is_what_is_loaded(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    first = small_subnet().push_to_hub("owner/name")
    other = replace(small_subnet(), provenance={"seed": 1})
    assert other.push_to_hub("owner/name", message="Another seed") != first
    assert SubNet.from_pretrained("owner/name") == other
    assert SubNet.from_pretrained("owner/name", revision=first) == small_subnet()


def test_pushing_keeps_the_other_files_of_a_repository(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake_hub.put("owner/name", {"README.md": b"hello"})
    commit = small_subnet().push_to_hub("owner/name")
    assert set(fake_hub.repos["model", "owner/name"].commits[commit]) == {
        "README.md",
        "subnet.json",
    }


def test_pushing_without_a_token_that_may_write_says_what_to_set(fake_hub: FakeHub) -> None:
    with pytest.raises(HubError, match="refuses access to owner/name .* HF_TOKEN"):
        small_subnet().push_to_hub("owner/name")


def test_pushing_to_nowhere_says_so(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachableError, match=r"subnet\.json cannot be written .* network"):
        small_subnet().push_to_hub("owner/name")


def test_a_repository_without_a_subnet_is_refused(fake_hub: FakeHub) -> None:
    fake_hub.put("owner/name", {"config.json": b"{}"})
    with pytest.raises(HubError, match=r"owner/name has no subnet\.json"):
        SubNet.from_pretrained("owner/name")


def test_files_and_folders_are_loaded_without_the_hub(tmp_path: Path) -> None:
    small_subnet().save(tmp_path / "subnet.json")
    assert SubNet.from_pretrained(tmp_path) == small_subnet()
    assert SubNet.from_pretrained(str(tmp_path / "subnet.json")) == small_subnet()
    with pytest.raises(SubNetError, match="no file, no folder .* and no repository"):
        SubNet.from_pretrained(tmp_path / "nothing" / "here" / "at all")


def test_model_settings_are_those_it_was_made_with() -> None:
    model = {**small_subnet().model, "base": "tiny-sd", "resolution": 64, "revision": "main"}
    settings = replace(small_subnet(), model=model).model_settings("float16")
    assert (settings.id, settings.revision) == (model["id"], "main")
    assert (settings.base, settings.resolution, settings.dtype) == ("tiny-sd", 64, "float16")
