"""S3: conditions honoured, answers that get lost, clear refusals. Oracle: moto on loopback."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from s3_server import BUCKET, Behaviour

from dipgo_core.errors import StorageError, StoreError
from orchestrator.store import open_store, s3


def test_store_on_s3_has_places_and_no_folder(s3_url: str) -> None:
    store = open_store(f"{s3_url}/")
    assert store.url == s3_url
    assert store.folder is None
    assert store.sweep_file_place("tiny", "report/report.html") == (
        f"{s3_url}/sweeps/tiny/report/report.html"
    )


def test_opening_asks_nobody(s3_url: str, behaviour: Behaviour) -> None:
    behaviour.requests.clear()
    open_store(s3_url)
    assert behaviour.requests == []


def test_storage_that_ignores_the_condition_is_refused(s3_url: str, behaviour: Behaviour) -> None:
    behaviour.ignores_condition = True
    store = open_store(s3_url)
    with pytest.raises(StoreError, match="ignores If-None-Match"), store.lease("tiny"):
        pass


def test_answer_that_got_lost_is_not_taken_for_somebody_elses(
    s3_url: str, behaviour: Behaviour
) -> None:
    backend = open_store(s3_url).backend
    behaviour.lost = 1
    behaviour.requests.clear()
    assert backend.put_if_absent("room/a", b"mine")
    assert behaviour.requests.count(f"PUT /{BUCKET}/some/prefix/room/a") == 2
    assert not backend.put_if_absent("room/a", b"mine")


class BusyServer:
    """A client whose conditional writes are all answered 409, while nothing is there."""

    def put_object(self, **asked: object) -> None:
        raise ClientError({"Error": {"Code": "ConditionalRequestConflict"}}, "PutObject")

    def head_object(self, **asked: object) -> None:
        raise ClientError({"Error": {"Code": "404"}}, "HeadObject")


def test_server_that_is_busy_to_the_end_is_no_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PAUSES_S", (0.0, 0.0))
    backend = s3.S3Backend("s3://bucket/x")
    backend._made = BusyServer()
    with pytest.raises(StorageError, match="records/x cannot be written.*busy, run again"):
        backend.put_if_absent("records/x", b"1")


def test_answer_that_got_lost_leaves_a_lease_to_its_holder(
    s3_url: str, behaviour: Behaviour
) -> None:
    store = open_store(s3_url)
    with store.lease("tiny"):
        pass
    behaviour.lost = 2  # of the check of the storage, and of the epoch
    with store.lease("tiny") as held:
        held.check()
    assert behaviour.lost == 0


def test_listing_and_deleting_take_more_than_one_page(
    s3_url: str, behaviour: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_PAGE", 2)
    backend = open_store(s3_url).backend
    names = [f"room/{number}" for number in range(5)]
    for name in names:
        backend.put(name, b"")
    behaviour.requests.clear()
    assert list(backend.list("room")) == names
    assert len(behaviour.requests) == 3
    backend.delete_all("room")
    assert list(backend.list("room")) == []


def test_bucket_that_is_not_there_is_named(s3_url: str) -> None:
    with pytest.raises(StoreError, match="s3://missing-bucket/.*NoSuchBucket.*create it"):
        open_store("s3://missing-bucket/x").backend.put("room/a", b"")


def test_server_that_is_down_is_a_clear_error(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(StoreError, match="cannot be read .*AWS_ENDPOINT_URL.*run again"):
        open_store(s3_url).backend.get("room/a")


@pytest.mark.parametrize("url", ["s3://key:geheim@bucket/x", "s3://bucket/x?token=geheim"])
def test_credentials_in_the_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreError, match=r"AWS_ACCESS_KEY_ID") as caught:
        open_store(url)
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://", "s3://UPPER/x", "s3://bucket/../x", "gs://bucket"])
def test_urls_that_lead_nowhere_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match=r"storage|no name"):
        open_store(url)


def test_file_url_is_a_folder(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}").folder == tmp_path
