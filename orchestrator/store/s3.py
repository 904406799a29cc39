"""S3Backend: a store in a bucket of S3 or what speaks its protocol (only import of boto3).

Endpoint, region and credentials come from the environment (AWS_*) or a profile, as boto3 finds
them: https://boto3.amazonaws.com/v1/documentation/api/latest/guide/configuration.html
"""

from __future__ import annotations

import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from dipgo_core.errors import StorageError, StoreError
from orchestrator.secrets import credentials_rule, redact
from orchestrator.store.backend import Entry
from orchestrator.store.names import check_name

T = TypeVar("T")

#: Metadata of an object: who wrote it, by which a repeated request knows that it is its own.
_WRITER = "dipgo-writer"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_PAGE = 1000  # the most objects that S3 lists or deletes at once
_TRIES = 5
_PAUSES_S = (0.1, 0.2, 0.5, 1.0, 2.0)
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_MISSING = {"NoSuchKey", "404", "NotFound"}
_EXISTS = {"PreconditionFailed", "412"}
_BUSY = {"ConditionalRequestConflict", "OperationAborted", "409"}
_ADVICE = {
    "NoSuchBucket": "create it, or name another in `storage`",
    "AccessDenied": "the credentials in the environment (AWS_*) must allow GetObject, PutObject, "
    "DeleteObject and ListBucket there",
    "403": "the credentials in the environment (AWS_*) must allow GetObject and ListBucket there "
    "(without ListBucket an object that is not there is refused, too)",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID or the profile",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY or the profile",
    "NotImplemented": "the server lacks this request: a store needs conditional writes "
    "(If-None-Match), see docs/store.md",
}


class S3Backend:
    """Objects of a bucket, under a prefix. Its client is made on first use, one a process."""

    def __init__(self, url: str) -> None:
        rule = credentials_rule(url)
        if rule is not None:
            raise StoreError(f"storage {rule}")
        bucket, _, prefix = url.removeprefix("s3://").strip("/").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise StoreError(
                f"storage {url!r}: {bucket!r} is no name of a bucket; write s3://BUCKET/PREFIX, "
                "and the server's address into AWS_ENDPOINT_URL"
            )
        self._bucket = bucket
        self._prefix = "/".join(check_name(prefix)) + "/" if prefix else ""
        self._lock = threading.Lock()
        self._made: Any = None

    def __reduce__(self) -> tuple[type[S3Backend], tuple[str]]:
        return S3Backend, (self.url,)  # a client cannot be sent to another process

    @property
    def url(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def folder(self) -> None:
        return None

    def place(self, name: str) -> str:
        return f"s3://{self._bucket}/{self._key(name)}"

    def get(self, name: str) -> bytes | None:
        with self._told(name, "read"):
            return _repeated(lambda: self._get(self._key(name)))

    def exists(self, name: str) -> bool:
        with self._told(name, "read"):
            return self._head(self._key(name)) is not None

    def put(self, name: str, data: bytes, *, durable: bool = False) -> None:
        """Write an object; S3 acknowledges only what is durable."""
        with self._told(name, "written"):
            self._client.put_object(Bucket=self._bucket, Key=self._key(name), Body=data)

    def put_if_absent(self, name: str, data: bytes, *, durable: bool = True) -> bool:
        """Write an object unless there is one; return whether this call wrote it.

        A request whose answer was lost is sent again by the client, and then refused for the sake
        of what it wrote itself: the object's metadata tells.
        """
        key, writer = self._key(name), uuid.uuid4().hex
        with self._told(name, "written"):
            for pause_s in _PAUSES_S:
                code = self._put_new(key, data, writer)
                if not code:
                    return True
                found = self._head(key)
                if found is not None:
                    return bool(found.get("Metadata", {}).get(_WRITER) == writer)
                time.sleep(pause_s)  # others write or delete it at this moment
        raise StorageError(
            f"{self.place(name)} cannot be written ({code}, and nothing is there): the server is "
            "busy, run again"
        )

    def list(self, prefix: str) -> Iterator[str]:
        check_name(prefix)
        return (entry.name for entry in self.entries(prefix))

    def entries(self, prefix: str) -> Iterator[Entry]:
        top = f"{self._key(prefix)}/" if prefix else self._prefix
        with self._told(prefix, "listed"):
            pages = self._client.get_paginator("list_objects_v2")
            sized = {"PageSize": _PAGE}
            for page in pages.paginate(Bucket=self._bucket, Prefix=top, PaginationConfig=sized):
                for found in page.get("Contents", ()):
                    name = found["Key"].removeprefix(self._prefix)
                    yield Entry(name, found["Size"], found["LastModified"].timestamp())

    def leftovers(self, older_than_s: float) -> Iterator[Entry]:
        """Return nothing: an upload that was cut off leaves no object."""
        return iter(())

    def delete(self, name: str) -> None:
        with self._told(name, "deleted"):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(name))

    def delete_all(self, prefix: str) -> None:
        names = self.list(prefix)
        with self._told(prefix, "deleted"):
            while batch := [{"Key": self._key(n)} for n in islice(names, _PAGE)]:
                asked = {"Objects": batch, "Quiet": True}
                answer = self._client.delete_objects(Bucket=self._bucket, Delete=asked)
                for failed in answer.get("Errors", ()):
                    raise StoreError(f"{failed.get('Key')} cannot be deleted: {failed}")

    def delete_leftover(self, entry: Entry) -> None:
        """Do nothing: there are none."""

    def _key(self, name: str) -> str:
        return self._prefix + "/".join(check_name(name))

    def _get(self, key: str) -> bytes | None:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.get_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise
        with answer["Body"] as body:
            data: bytes = body.read()
            return data

    def _head(self, key: str) -> dict[str, Any] | None:
        from botocore.exceptions import ClientError

        try:
            found: dict[str, Any] = self._client.head_object(Bucket=self._bucket, Key=key)
        except ClientError as error:
            if _code(error) in _MISSING:
                return None
            raise
        return found

    def _put_new(self, key: str, data: bytes, writer: str) -> str:
        """Write an object unless there is one; return why not, "" if it was written."""
        from botocore.exceptions import ClientError

        try:
            self._client.put_object(
                Bucket=self._bucket,
                Key=key,
                Body=data,
                IfNoneMatch="*",
                Metadata={_WRITER: writer},
            )
        except ClientError as error:
            if _code(error) not in _EXISTS | _BUSY:
                raise
            return _code(error)
        return ""

    @property
    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                self._made = _new_client()
            return self._made

    @contextmanager
    def _told(self, name: str, what: str) -> Iterator[None]:
        """Turn errors of the client into one that names object, reason and next move."""
        _require_boto3()
        from botocore import exceptions as boto

        try:
            yield
        except boto.ClientError as error:
            advice = _ADVICE.get(_code(error), "see that the storage works, and run again")
            kind = StoreError if _code(error) in _ADVICE else StorageError
            raise kind(self._refusal(name, what, error, advice)) from error
        except boto.BotoCoreError as error:
            advice = (
                "check the network, AWS_ENDPOINT_URL and the credentials in the environment, and "
                "run again: nothing finished is lost"
            )
            passing = (
                boto.HTTPClientError, boto.IncompleteReadError, boto.ResponseStreamingError,
            )  # fmt: skip
            kind = StorageError if isinstance(error, passing) else StoreError
            raise kind(self._refusal(name, what, error, advice)) from error

    def _refusal(self, name: str, what: str, error: Exception, advice: str) -> str:
        place = f"s3://{self._bucket}/{self._prefix}{name}"
        return redact(f"{place} cannot be {what} ({type(error).__name__}: {error}): {advice}")


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _repeated(read: Callable[[], T]) -> T:
    """Read again what breaks off half-way, which boto3 itself does not."""
    from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError

    for _ in range(_TRIES - 1):
        try:
            return read()
        except (IncompleteReadError, ReadTimeoutError, ResponseStreamingError):
            continue
    return read()


def _require_boto3() -> None:
    try:
        import boto3  # noqa: F401
    except ImportError as error:
        raise StoreError(
            "storage on S3 needs boto3: pip install 'dipgo-sweep[s3]', on every node"
        ) from error


def _new_client() -> Any:
    import boto3
    from botocore.config import Config

    own = any(os.environ.get(name) for name in _ENDPOINTS)  # where buckets have no host names
    settings = Config(
        connect_timeout=10,
        read_timeout=60,
        retries={"mode": "standard", "max_attempts": _TRIES},
        s3={"addressing_style": "path"} if own else {},
    )
    return boto3.session.Session().client("s3", config=settings)
