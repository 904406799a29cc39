"""Published PyTorch files are read as tensors, and nothing else in them is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dipgo_core.errors import ModelFilesError
from dipgo_core.evaluation.published import read_tensors


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("harm"),)  # type: ignore[return-value]


def test_tensors_come_back_by_name(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(3)}, tmp_path / "file.pth")

    assert read_tensors(tmp_path / "file.pth")["a"].tolist() == [0, 1, 2]


def test_code_in_a_file_is_refused_and_not_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Harmful()}, tmp_path / "file.pth")

    with pytest.raises(ModelFilesError, match=r"file\.pth cannot be read as tensors"):
        read_tensors(tmp_path / "file.pth")
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [b"", b"torn", b"PK\x03\x04 half an archive"])
def test_torn_files_are_one_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.pth").write_bytes(content)

    with pytest.raises(ModelFilesError, match="may be truncated"):
        read_tensors(tmp_path / "file.pth")


def test_other_things_than_a_state_dict_are_refused(tmp_path: Path) -> None:
    torch.save([torch.arange(3)], tmp_path / "file.pth")

    with pytest.raises(ModelFilesError, match="is no state dict"):
        read_tensors(tmp_path / "file.pth")
