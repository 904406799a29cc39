"""`models[].base`: read, refused, pinned, looked up and run like the rest of a sweep file."""

from __future__ import annotations

from pathlib import Path

import pytest
from single_file import write_single_file
from tiny import tiny_sd

from dipgo_core.config import ModelSettings
from dipgo_core.errors import SweepFileError
from orchestrator.hub_needs import hub_needs, with_commits
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_settings import SweepFile

HEAD = """schema_version: 1
name: based
allow_unpinned: {loose}
targets: [0.5]
search: {{calibration: {{prompts: bundled:calibration}}}}
evaluate: {{prompts: bundled:test, images: 8, metrics: [psnr]}}
models:
"""
LCM, XL = "latent-consistency/lcm-sdxl", "stabilityai/stable-diffusion-xl-base-1.0"
ONE, TWO = "1" * 40, "2" * 40


def sweep(tmp_path: Path, entry: str, loose: bool = True) -> SweepFile:
    path = tmp_path / "sweep.yaml"
    path.write_text(HEAD.format(loose=str(loose).lower()) + f"  - {entry}\n", "utf-8")
    return load_sweep(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    pipe = tiny_sd()
    pipe.save_pretrained(tmp_path / "whole")
    write_single_file(pipe, tmp_path / "one.safetensors")
    return tmp_path


def test_a_file_beside_the_sweep_file_takes_the_family_of_its_base(folder: Path) -> None:
    (model,) = sweep(folder, "{id: one.safetensors, base: whole}").models
    assert model.family == "sd"
    assert model.settings == ModelSettings(
        id=str(folder / "one.safetensors"), base=str(folder / "whole")
    )
    assert hub_needs(sweep(folder, "{id: one.safetensors, base: tiny-sd}")) == ()


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        ("one.safetensors", "one file of weights, without configs.*name with `base`"),
        ("{id: gone.safetensors, base: tiny-sd}", "there is no file gone.safetensors"),
        ("{id: weights.ckpt, base: tiny-sd}", "is a pickle"),
        ("{id: one.safetensors, base: nobody}", "'nobody' is no bundled model"),
        ("{id: one.safetensors, base: " + LCM + "}", "is no whole pipeline itself"),
        ("{id: one.safetensors, base: whole, revision: main}", "only models on the hub have one"),
    ],
)
def test_bad_bases_are_refused(folder: Path, entry: str, rule: str) -> None:
    with pytest.raises(SweepFileError, match=rule):
        sweep(folder, entry)


def test_a_base_on_the_hub_has_to_name_a_commit(tmp_path: Path) -> None:
    with pytest.raises(SweepFileError, match=rf"base.*must name a commit.*{XL}@<commit>"):
        sweep(tmp_path, f"{{id: {LCM}, revision: {'a' * 40}}}", loose=False)


def test_needs_of_a_denoiser_alone_are_pinned_apart(tmp_path: Path) -> None:
    read = sweep(tmp_path, LCM)
    needs = {need.id: need for need in hub_needs(read)}
    assert (needs[LCM].kind, needs[XL].kind) == ("denoiser", "model")
    assert needs[XL].elsewhere == "denoiser"
    pinned = with_commits(read, {needs[LCM].key: ONE, needs[XL].key: TWO})
    (model,) = pinned.models
    assert (model.settings.revision, model.settings.base) == (ONE, f"{XL}@{TWO}")
    assert {need.pinned for need in hub_needs(pinned) if need.kind != "scorer"} >= {True}
