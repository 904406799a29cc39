"""Prompts of hub data sets. Oracle: the rows that a fake hub on loopback serves."""

from __future__ import annotations

import io

import pyarrow
import pytest
from fake_hub import FakeHub
from huggingface_hub import constants
from pyarrow import parquet

from dipgo_core.errors import EvaluationError, HubError, HubUnreachableError
from dipgo_core.evaluation.prompts import read_items

SOURCE = {"hub": "owner/name", "file": "rows.parquet", "column": "Prompt"}


def table(count: int) -> bytes:
    buffer = io.BytesIO()
    rows = {"prompt": [f"cat {i}" for i in range(count)], "part": list(range(count))}
    parquet.write_table(pyarrow.table(rows), buffer)
    return buffer.getvalue()


def test_first_rows_of_a_hub_file_are_read(fake_hub: FakeHub) -> None:
    fake_hub.put("owner/name", {"rows.parquet": table(2500), "other": b"x"}, kind="dataset")
    items = read_items({**SOURCE, "rows": 1200})
    assert [item.prompt for item in items] == [f"cat {i}" for i in range(1200)]
    assert fake_hub.downloads == {"owner/name/rows.parquet": 1}


def test_revision_decides_which_rows(fake_hub: FakeHub) -> None:
    old = fake_hub.put("owner/name", {"rows.parquet": table(3)}, kind="dataset")
    fake_hub.put("owner/name", {"rows.parquet": table(5)}, kind="dataset")
    assert len(read_items({**SOURCE, "revision": old})) == 3
    assert len(read_items(SOURCE)) == 5


def test_fetched_file_is_read_offline(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub.put("owner/name", {"rows.parquet": table(3)}, kind="dataset")
    first = read_items(SOURCE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert read_items(SOURCE) == first


def test_unreachable_hub_says_what_to_give(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match=r"owner/name .*HF_HUB_OFFLINE.* local .*file"):
        read_items(SOURCE)


def test_missing_file_is_named(fake_hub: FakeHub) -> None:
    fake_hub.put("owner/name", {"rows.csv": b"prompt\n"}, kind="dataset")
    with pytest.raises(HubError, match=r"owner/name has no rows.parquet at commit"):
        read_items(SOURCE)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [None, 2])
def test_data_set_without_a_file_is_read_through_datasets(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, rows: int | None
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", fake_hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", constants.HF_HUB_CACHE + "/sets")
    lines = b'{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"}\n'
    fake_hub.put("owner/name", {"train.jsonl": lines}, kind="dataset")
    items = read_items({"hub": "owner/name", "rows": rows})
    assert [item.prompt for item in items] == ["a", "b", "c"][:rows]


def test_absent_package_is_named_with_the_extra_that_has_it(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.put("owner/name", {"train.jsonl": b"{}"}, kind="dataset")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(EvaluationError, match=r"needs the package 'datasets'.*dipgo-sweep\[data"):
        read_items({"hub": "owner/name"})
