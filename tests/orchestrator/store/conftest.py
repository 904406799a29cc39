"""Storages that the tests of the store run on: a folder, and an S3 on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import BUCKET, Behaviour, empty_bucket, environment, s3_server

from orchestrator.store import Store, open_store


@pytest.fixture(scope="session")
def s3_running() -> Iterator[tuple[str, Behaviour]]:
    with s3_server() as running:
        yield running


@pytest.fixture
def s3_url(s3_running: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty bucket; the environment leads to it."""
    address, behaviour = s3_running
    behaviour.__init__()  # type: ignore[misc]
    for name, value in environment(address).items():
        monkeypatch.setenv(name, value)
    empty_bucket(address)
    return f"s3://{BUCKET}/some/prefix"


@pytest.fixture
def behaviour(s3_running: tuple[str, Behaviour], s3_url: str) -> Behaviour:
    return s3_running[1]


@pytest.fixture(params=["folder", "s3"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty store of each kind."""
    url = tmp_path / "store" if request.param == "folder" else request.getfixturevalue("s3_url")
    return open_store(url)
