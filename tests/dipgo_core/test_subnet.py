"""SubNet files: round trip, refusals, and no half-written file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dipgo_core.errors import SubNetError
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
        model={"id": "m", "config": config, "config_sha256": config_sha256(config)},
        sampler={
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
        (lambda d: d.update(schema_version=2), "schema_version 2"),
        (lambda d: d.pop("keep"), "lacks keep"),
        (lambda d: d.update(keep=["11"]), "1 entries"),
        (lambda d: d.update(keep=["11", "1"]), "all of one length"),
        (lambda d: d.update(keep=["11", "x1"]), "0 and 1"),
        (lambda d: d.update(keep=7), "not a complete SubNet file"),
        (lambda d: d["blocks"].pop(), "blocks has 1 names"),
        (lambda d: d["blocks"][0].update(reuse="maybe"), "not a complete SubNet file"),
        (lambda d: d["model"]["config"].update(sample_size=9), "does not match"),
        (lambda d: d["sampler"].pop("config_sha256"), "does not match"),
        (lambda d: d.update(model=[]), "not a complete SubNet file"),
        (lambda d: d["sampler"].pop("timesteps"), "got none"),
    ],
)
def test_from_json_refuses_broken_documents(
    change: Callable[[dict[str, Any]], object], message: str
) -> None:
    with pytest.raises(SubNetError, match=message):
        SubNet.from_json(edited(change), source="x.json")


def test_from_json_refuses_what_is_no_object() -> None:
    with pytest.raises(SubNetError, match="not a SubNet file"):
        SubNet.from_json([1])


@pytest.mark.parametrize("content", [b'{"kind": "dipgo.sub', b"\xff\xfe", b""])
def test_load_refuses_truncated_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(SubNetError, match="not JSON"):
        SubNet.load(path)


def test_load_says_how_to_get_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(SubNetError, match="dipgo-sweep export"):
        SubNet.load(tmp_path / "none.json")
