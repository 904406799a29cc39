"""One file of a hub data set as prompts. Oracle: the rows written to the file; a fake hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.prompts import read_items

SOURCE = {"hub": "owner/name", "file": "rows.parquet", "revision": "v1", "column": "Prompt"}


def write_rows(path: Path, count: int) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"prompt": [f"cat {i}" for i in range(count)]}), path)


def test_first_rows_of_a_hub_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "rows.parquet", 2500)

    def download(repo: str, file: str, *, repo_type: str, revision: str | None) -> str:
        assert (repo, repo_type, revision) == ("owner/name", "dataset", "v1")
        return str(tmp_path / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    items = read_items({**SOURCE, "rows": 1200})
    assert [item.prompt for item in items] == [f"cat {i}" for i in range(1200)]


def test_unreachable_hub_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(EvaluationError, match="rows.parquet of the data set owner/name .*no netw"):
        read_items(SOURCE)
