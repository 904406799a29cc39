"""Facts a plan needs, read again on another machine. Oracle: what the running machine saw."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dipgo_core.config import ModelSettings
from dipgo_core.errors import PreflightError, StoreError, SweepFileError
from dipgo_core.pipelines import load_model, scale_factor
from dipgo_core.zoo import zoo_path
from orchestrator.facts import gather_facts, known_items, with_kept_items
from orchestrator.sweep_file import SweepFile, load_sweep
from tests.orchestrator.tiny_sweep import item_set


def test_hub_prompts_keep_the_digest_they_had_when_the_sweep_ran(repository: Path) -> None:
    sweep = load_sweep(repository / "sweeps" / "sd_family.yaml")
    seen = {
        name: replace(
            facts,
            test=replace(facts.test, sha256="a" * 64, count=7),
            calibration=replace(facts.calibration, sha256="b" * 64, count=9),
        )
        for name, facts in gather_facts(sweep, offline=True).items()
    }
    known = json.loads(json.dumps(known_items(sweep, seen)))
    for facts in gather_facts(sweep, offline=True, known=known).values():
        assert (facts.test.sha256, facts.test.count) == ("a" * 64, 7)
        assert (facts.calibration.sha256, facts.calibration.count) == ("b" * 64, 9)


def sweep_on(tmp_path: Path, *lines: str, models: str = "[tiny-sd]") -> SweepFile:
    (tmp_path / "prompts.txt").write_text("a red hat\na blue bag\na green shoe\n")
    text = "\n".join(
        ["schema_version: 1", "name: x", f"models: {models}", "targets: [0.5]", *lines]
    )
    file = tmp_path / "x.yaml"
    file.write_text(text + "\n")
    return load_sweep(file)


def test_a_prompt_set_shorter_than_the_images_is_refused(tmp_path: Path) -> None:
    sweep = sweep_on(tmp_path, "evaluate: {prompts: prompts.txt, images: 7}")

    with pytest.raises(PreflightError, match=r"images is 7, .* 3 prompts .*images_per_prompt: 3"):
        gather_facts(sweep)


@pytest.mark.parametrize(
    ("models", "side"), [("[tiny-sd]", 32), ("[{id: tiny-sd, resolution: 64}]", 64)]
)
def test_image_size_is_the_models_own_unless_the_file_says_another(
    models: str, side: int, tmp_path: Path
) -> None:
    (facts,) = gather_facts(sweep_on(tmp_path, models=models)).values()
    assert (facts.height, facts.width) == (side, side)


BUNDLED_ITEMS = (
    "search: {calibration: {prompts: bundled:calibration}}",
    "evaluate: {prompts: bundled:test, images: 4, metrics: [psnr]}",
)


def test_image_size_of_a_denoiser_alone_is_its_own(tmp_path: Path) -> None:
    """Oracle: the pipeline loaded with this denoiser, and its images."""
    unet = Path(shutil.copytree(zoo_path("tiny-sd") / "unet", tmp_path / "unet"))
    config = json.loads((unet / "config.json").read_text("utf-8"))
    (unet / "config.json").write_text(json.dumps({**config, "sample_size": 24}), "utf-8")
    sweep = sweep_on(tmp_path, *BUNDLED_ITEMS, models="[{id: unet, base: tiny-sd}]")
    (facts,) = gather_facts(sweep).values()
    model = load_model(ModelSettings(id=str(unet), base="tiny-sd"))
    assert facts.height == model.resolution == scale_factor(model.pipe) * 24 != 32


def test_configs_without_the_size_of_images_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(zoo_path("tiny-sd"), tmp_path / "sizeless"))
    config = json.loads((folder / "unet" / "config.json").read_text("utf-8"))
    del config["sample_size"]
    (folder / "unet" / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(PreflightError, match=r"unet/config.json has no 'sample_size'.*resolution"):
        gather_facts(sweep_on(tmp_path, *BUNDLED_ITEMS, models="[sizeless]"))


def test_prompts_may_be_shown_several_times_if_asked_for(tmp_path: Path) -> None:
    asked = "evaluate: {prompts: prompts.txt, images: 7, images_per_prompt: 3}"

    assert gather_facts(sweep_on(tmp_path, asked))["tiny-sd-ddim-10"].test.count == 3
    assert (
        gather_facts(sweep_on(tmp_path, "evaluate: {images: 700}"))["tiny-sd-ddim-10"].test.count
        == 100
    )


def test_items_do_not_depend_on_the_number_of_images(tmp_path: Path) -> None:
    few, many = (sweep_on(tmp_path, f"evaluate: {{images: {n}}}") for n in (10, 50))

    assert gather_facts(few)["tiny-sd-ddim-10"].test == gather_facts(many)["tiny-sd-ddim-10"].test


def test_all_problems_of_all_models_are_told_together(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a red hat\n")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{}")
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    broken = shutil.copytree(zoo_path("tiny-sd"), tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    sweep = sweep_on(
        tmp_path,
        "search: {calibration: {prompts: bundled:calibration}}",
        "evaluate: {prompts: short.txt, images: 4, scorers: {clip: torn}}",
        models=f"[tiny-sd, {broken}]",
    )
    with pytest.raises(PreflightError) as caught:
        gather_facts(sweep)
    lines = str(caught.value).splitlines()
    assert lines[0] == "x cannot be run, 5 problems:"
    assert [line.split(": ")[:2] for line in lines[1:]] == [
        ["  tiny-sd-ddim-10", "evaluate.prompts"],
        ["  tiny-sd-ddim-10", "evaluate.scorers.clip"],
        ["  broken-ddim-50", "evaluate.prompts"],
        ["  broken-ddim-50", "id"],
        ["  broken-ddim-50", "evaluate.scorers.clip"],
    ]


def test_chosen_classes_are_the_items_of_a_label_model(tmp_path: Path) -> None:
    asked = "evaluate: {prompts: {labels: [5, 0]}, images: 8}"
    facts = gather_facts(sweep_on(tmp_path, asked, models="[tiny-dit]"))
    (found,) = facts.values()
    assert {item.label for item in found.test.items or ()} == {0, 5}


def test_rows_fewer_than_the_images_are_refused_without_network(tmp_path: Path) -> None:
    short = "evaluate: {prompts: {hub: owner/words, file: p.txt, rows: 5}, images: 7}"
    sweep = sweep_on(tmp_path, short, "allow_unpinned: true")
    with pytest.raises(PreflightError, match=r"images is 7, but the prompt set has 5 prompts"):
        gather_facts(sweep, offline=True)


def moments_on(tmp_path: Path, resize: str, metrics: str) -> SweepFile:
    """A sweep that compares with the mean and covariance of some file."""
    np.savez(tmp_path / "real.npz", mu=np.zeros(64), sigma=np.eye(64))
    reference = f"{{statistics: real.npz, extractor: tiny-features, resize: {resize}}}"
    return sweep_on(tmp_path, f"evaluate: {{reference: {reference}, metrics: {metrics}}}")


def test_moments_of_the_same_scale_are_a_reference(tmp_path: Path) -> None:
    sweep = moments_on(tmp_path, "antialiased bilinear to 32x32", "[fid, clip]")

    facts = gather_facts(sweep)["tiny-sd-ddim-10"]

    assert facts.reference.startswith("statistics:")
    assert facts.reference_value == str(tmp_path / "real.npz")


@pytest.mark.parametrize(
    ("resize", "metrics", "rule"),
    [
        ("PIL bicubic", "[fid]", "another resize is another scale"),
        ("antialiased bilinear to 32x32", "[fid, kid]", "kid needs the features"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_before_anything_runs(
    tmp_path: Path, resize: str, metrics: str, rule: str
) -> None:
    with pytest.raises(PreflightError, match=rule):
        gather_facts(moments_on(tmp_path, resize, metrics))


@pytest.mark.parametrize(
    ("metrics", "images", "rule"),
    [("[kid]", 8, "kid draws subsets of 4 images, .* holds 3"), ("[fid]", 2, r"image .*0\.png")],
)
def test_folder_that_cannot_serve_is_refused_before_anything_runs(
    tmp_path: Path, metrics: str, images: int, rule: str
) -> None:
    (tmp_path / "few").mkdir()
    for index in range(3):
        (tmp_path / "few" / f"{index}.png").write_bytes(b"no image")
    reference = f"reference: {{folder: few}}, metrics: {metrics}, images: {images}"
    sweep = sweep_on(tmp_path, f"evaluate: {{{reference}, images_per_prompt: 3}}")
    with pytest.raises(PreflightError, match=rule):
        gather_facts(sweep)


def test_moments_that_do_not_tell_what_made_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real.npz").touch()

    with pytest.raises(SweepFileError, match="need extractor and resize"):
        sweep_on(tmp_path, "evaluate: {reference: {statistics: real.npz}}")


def test_items_shown_are_known_again_from_what_the_run_kept(repository: Path) -> None:
    sweep = load_sweep(repository / "sweeps" / "sd_family.yaml")
    unread = gather_facts(sweep, offline=True)
    seen = item_set("a cat", "a dog", "a cow")
    known = {name: replace(each, test=replace(seen, items=None)) for name, each in unread.items()}
    blobs = {seen.sha256: seen.blob()}

    def read(digest: str) -> bytes:
        if digest not in blobs:
            raise StoreError(f"no blob {digest}")
        return blobs[digest]

    for facts in with_kept_items(known, read).values():
        assert facts.test == seen
        assert facts.calibration.items is None  # nobody kept them


def test_digest_of_items_shown_is_that_of_the_first_images() -> None:
    assert item_set("a cat", "a dog", "a cow").shown_sha256(2) == item_set("a cat", "a dog").sha256
    assert item_set("a cat").shown_sha256(2) == item_set("a cat", "a cat").sha256


def test_classes_of_one_name_are_all_items(tmp_path: Path) -> None:
    twins = shutil.copytree(zoo_path("tiny-dit"), tmp_path / "twins")
    index = json.loads((twins / "model_index.json").read_text())
    index["id2label"] |= {"1": "crane", "2": "maillot", "3": "maillot, tank suit", "5": "crane"}
    (twins / "model_index.json").write_text(json.dumps(index))
    (facts,) = gather_facts(sweep_on(tmp_path, models=f"[{twins}]")).values()
    assert sorted(item.label for item in facts.test.items or ()) == list(range(280))
    assert facts.test.count == 280


def test_repeated_prompts_are_one_item(tmp_path: Path) -> None:
    (tmp_path / "same.txt").write_text("a red hat\nA red  hat\na red hat\na blue bag\n")
    sweep = sweep_on(tmp_path, "evaluate: {prompts: same.txt, images: 2, metrics: [psnr]}")
    facts = gather_facts(sweep)["tiny-sd-ddim-10"]
    assert {item.prompt for item in facts.test.items or ()} == {"a red hat", "a blue bag"}
    assert (facts.test.count, facts.test.repeated) == (2, 2)
    with pytest.raises(PreflightError, match=r"images is 4, .* 2 prompts"):
        gather_facts(sweep_on(tmp_path, "evaluate: {prompts: same.txt, images: 4}"))


def test_bundled_sweeps_keep_their_items(repository: Path) -> None:
    """Oracle: the digests of the records that were made before repeated items were left out."""
    facts = gather_facts(load_sweep(repository / "sweeps" / "tiny_full.yaml"))
    assert [(f.test.sha256[:8], f.calibration.sha256[:8]) for f in facts.values()] == [
        ("98f649cc", "70f5e579"),
        ("f9672afc", "f9672afc"),
    ]


@pytest.mark.parametrize(
    "split", ["search: {calibration: {prompts: %s}}", "evaluate: {prompts: %s}"]
)
def test_more_rows_than_a_file_has_are_refused(tmp_path: Path, split: str) -> None:
    sweep = sweep_on(tmp_path, split % "{file: prompts.txt, rows: 100}")
    with pytest.raises(PreflightError, match=r"rows is 100, but .*prompts.txt has 3"):
        gather_facts(sweep)
