"""What goes along with a sweep that is sent to a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from dipgo_core.errors import ConfigError
from orchestrator import cargo
from orchestrator.cargo import SWEEP_FILE, pack
from orchestrator.sweep_file import load_sweep

TEXT = """
schema_version: 1
name: sent
models: [tiny-sd]
search: {strategy: dipgo, steps: 4}
targets: [0.5]
evaluate: {images: 8, metrics: [psnr], prompts: prompts.txt}
storage: /mnt/shared/dipgo
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    here = tmp_path / "here"
    here.mkdir()
    (here / "prompts.txt").write_text("a red hat\na blue coat\n")
    (here / "sweep.yaml").write_text(TEXT)
    return here / "sweep.yaml"


def packed(file: Path, *overrides: str, name: str = "cargo") -> cargo.Cargo:
    folder = file.parents[1] / name
    folder.mkdir()
    return pack(file, overrides, folder)


def test_cargo_holds_the_prompts_under_their_digest(file: Path) -> None:
    found = packed(file)
    (override,) = found.overrides
    field, _, name = override.partition("=")
    assert field == "evaluate.prompts"
    assert (found.folder / name.strip('"')).read_text() == "a red hat\na blue coat\n"


def test_cargo_is_the_same_sweep_where_it_arrives(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = packed(file, "targets=[0.3]")
    monkeypatch.chdir(found.folder)  # as a job's working folder
    there, here = load_sweep(SWEEP_FILE, found.overrides), load_sweep(file, ["targets=[0.3]"])
    prompts = Path(there.models[0].evaluate.prompts.value)
    assert not prompts.is_absolute() and prompts.is_file()
    assert there.name == here.name
    assert there.models[0].targets == here.models[0].targets == (0.3,)


def test_digest_follows_content_and_settings_and_not_places(file: Path) -> None:
    first = packed(file, name="a").digest
    (file.parent / "elsewhere.txt").write_bytes((file.parent / "prompts.txt").read_bytes())
    assert packed(file, name="b").digest == first
    assert packed(file, "targets=[0.3]", name="c").digest != first
    (file.parent / "prompts.txt").write_text("another\n")
    assert packed(file, name="d").digest != first


def test_bundled_models_stay_where_they_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "tiny-sd").mkdir()  # of the same name, and not meant
    monkeypatch.chdir(file.parent)
    assert [each.partition("=")[0] for each in packed(file).overrides] == ["evaluate.prompts"]


def test_storage_of_this_machine_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"storage: \./\.dipgo is relative.*s3://bucket"):
        packed(file, "storage=./.dipgo")


def test_files_too_large_are_refused_with_their_sizes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cargo, "LARGEST_BYTES", 10)
    with pytest.raises(ConfigError, match=r"evaluate\.prompts: .*prompts\.txt, 0 MiB") as refused:
        packed(file)
    assert "name that path with -o" in str(refused.value)
