"""Inception: converted once, read safely; equal to what torch-fidelity makes of the archive."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from fidelity import by_program, save_images, untrained_inception
from torch import Tensor

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation import inception, inception_files
from dipgo_core.evaluation.fid import fid_figures, folder_reference, kid_figure, load_extractor
from dipgo_core.evaluation.inception import inception_state
from dipgo_core.evaluation.inception_files import (
    INCEPTION_FILE,
    INCEPTION_SHA256,
    checked_inception,
)
from dipgo_core.evaluation.scorers import features_scorer


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders of our own for weights and copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "cache" / "dipgo-sweep" / "inception"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small state dict as an archive; no network needs it."""
    torch.save({"weight": torch.arange(6.0), "steps": torch.tensor(3)}, tmp_path / "own.pth")
    return tmp_path / "own.pth"


def named(path: Path) -> str:
    return f"inception-v3-compat:{path}"


def put_published(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes) -> Path:
    """Take `data` for the published file, where torch.hub keeps it."""
    path = tmp_path / "torch" / "hub" / "checkpoints" / INCEPTION_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_archive_is_converted_once_and_then_not_read(
    archive: Path, cache: Path, monkeypatch
) -> None:
    first = inception_state(named(archive))
    monkeypatch.setattr(inception, "read_tensors", lambda _: pytest.fail("read again"))

    again = inception_state(named(archive))

    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert [path.name for path in cache.iterdir()] == [f"{digest}.safetensors"]
    assert torch.equal(again["weight"], torch.arange(6.0))
    assert first["steps"] == again["steps"] == 3


def test_converted_file_may_be_named_and_has_the_digest_of_its_original(
    archive: Path, cache: Path, tmp_path: Path
) -> None:
    inception_state(named(archive))
    (copy,) = cache.iterdir()
    moved = copy.rename(tmp_path / "moved.safetensors")

    assert features_scorer(named(moved)) == features_scorer(named(archive))
    assert torch.equal(inception_state(named(moved))["weight"], torch.arange(6.0))


def test_published_weights_are_read_from_the_copy_alone(cache: Path, archive: Path) -> None:
    inception_state(named(archive))
    (copy,) = cache.iterdir()
    copy.rename(cache / f"{INCEPTION_SHA256}.safetensors")

    assert torch.equal(inception_state("inception-v3-compat")["weight"], torch.arange(6.0))


def test_missing_published_file_is_named_with_its_size_and_place(tmp_path: Path) -> None:
    place = tmp_path / "torch" / "hub" / "checkpoints" / INCEPTION_FILE

    with pytest.raises(ModelFilesError, match=r"95,628,359 bytes\): fetch https://") as caught:
        checked_inception()

    assert str(place) in str(caught.value)


def test_truncated_published_file_is_refused(monkeypatch, tmp_path: Path) -> None:
    put_published(monkeypatch, tmp_path, b"half of it")

    with pytest.raises(ModelFilesError, match="has 10 bytes, the published file has 95,628,359"):
        load_extractor("inception-v3-compat")


def test_other_bytes_of_the_published_size_are_refused(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inception_files, "INCEPTION_BYTES", 10)
    put_published(monkeypatch, tmp_path, b"half of it")

    with pytest.raises(ModelFilesError, match=f"that of the published file {INCEPTION_SHA256}"):
        checked_inception()


class Trap:
    """Unpickling it would run code."""

    def __reduce__(self):
        return (pytest.fail, ("a pickle was executed",))


def test_archive_with_code_in_it_is_not_executed(tmp_path: Path, cache: Path) -> None:
    torch.save({"weight": Trap()}, tmp_path / "own.pth")

    with pytest.raises(ModelFilesError, match="cannot be read as tensors"):
        load_extractor(named(tmp_path / "own.pth"))

    assert not cache.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("check", [checked_inception, load_extractor])
def test_torn_files_are_named(archive: Path, tmp_path: Path, suffix: str, check) -> None:
    torn = tmp_path / f"torn{suffix}"
    torn.write_bytes(archive.read_bytes()[:500])

    with pytest.raises(ModelFilesError, match=rf"torn{suffix} cannot be read"):
        check(named(torn))


def test_archive_with_a_flipped_byte_is_refused(archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    data[data.index(torch.arange(6.0).numpy().tobytes()) + 5] ^= 1
    archive.write_bytes(data)

    with pytest.raises(ModelFilesError, match=r"own.pth cannot be read .*copy it again"):
        checked_inception(named(archive))


def test_torn_copy_says_what_to_delete(archive: Path, cache: Path) -> None:
    inception_state(named(archive))
    (copy,) = cache.iterdir()
    copy.write_bytes(b"torn")

    with pytest.raises(ModelFilesError, match="delete it where it is the copy"):
        inception_state(named(archive))


def test_missing_named_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFilesError, match=r"cannot read .*none.pth: No such file"):
        features_scorer(named(tmp_path / "none.pth"))


def test_cache_that_cannot_be_written_says_so(archive: Path, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    with pytest.raises(ModelFilesError, match="set XDG_CACHE_HOME"):
        inception_state(named(archive))


def test_weights_of_another_network_are_refused(archive: Path) -> None:
    with pytest.raises(ModelFilesError, match="weights of inception-v3-compat.* cannot be read"):
        load_extractor(named(archive))


@pytest.mark.slow
def test_several_processes_may_convert_at_once(archive: Path, cache: Path) -> None:
    code = "from dipgo_core.evaluation.inception import inception_state as read;"
    code += f"print(read({named(archive)!r})['weight'].tolist())"
    runs = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]

    assert [run.communicate()[0] for run in runs] == ["[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]\n"] * 3
    assert len(list(cache.iterdir())) == 1


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The archive of a seeded, untrained Inception: no download is needed for the right shapes."""
    return untrained_inception(tmp_path_factory.mktemp("weights") / "untrained.pth")


def noise(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=generator, dtype=torch.uint8)


@pytest.mark.slow
def test_features_equal_those_of_the_library_from_the_archive(untrained: Path) -> None:
    # oracle: torch-fidelity's own class and its own loading
    library = torch_fidelity.FeatureExtractorInceptionV3(
        "x", ["2048"], feature_extractor_weights_path=str(untrained)
    )

    found = load_extractor(named(untrained))(noise(0, 2))

    assert found.shape == (2, 2048)
    assert np.array_equal(found, library(noise(0, 2))[0].numpy())


@pytest.mark.slow
def test_fid_and_kid_equal_the_command_line_of_torch_fidelity(
    untrained: Path, tmp_path: Path
) -> None:
    # oracle: the library's program, in a process of its own, on the same two folders of PNGs
    ours = save_images(noise(0, 12), tmp_path / "ours")
    real = save_images(noise(1, 14) // 2, tmp_path / "real")
    weights = ("--feature-extractor-weights-path", str(untrained))
    fid, kid = by_program(ours, real, 6, *weights)
    extractor = load_extractor(named(untrained))
    reference, features = folder_reference(real, extractor), extractor(noise(0, 12))

    found = fid_figures(features, reference, np.arange(12)) | {
        "kid": kid_figure(features, reference, np.arange(12), subset_size=6)
    }

    assert found["fid"].value == pytest.approx(fid, rel=1e-6)
    assert found["kid"].value == pytest.approx(kid, rel=1e-6)
