"""JSON documents that tell whether they were torn or edited, and bytes that tell the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dipgo_core.errors import StoreError
from orchestrator.records import Record, content_key

_DIGEST_BYTES = 32
#: What to do about a record or an artifact that is not what was written.
MENDING = "set it aside with `dipgo-sweep cache verify --repair` and run again"


def sealed(document: Mapping[str, Any]) -> bytes:
    """Return the document as JSON with a digest of itself, by which edits are noticed.

    Raises:
        StoreError: a figure is not finite.
    """
    try:
        text = json.dumps({**document, "sha256": content_key(document)}, indent=1, allow_nan=False)
    except ValueError as error:
        raise StoreError(
            f"the record of {document.get('kind')} task {str(document.get('key'))[:12]} cannot be "
            f"stored: {error}; figures without a finite value are stored as null"
        ) from error
    return text.encode()


def parse_record(data: bytes, key: str, place: str) -> Record:
    """Return the record in `data`, which lies at `place` under `key`.

    Raises:
        StoreError: it is torn or was edited.
    """
    remedy = f"{MENDING}, only what is damaged is computed anew"
    document = parse_object(data, place, remedy)
    digest = document.pop("sha256", None)
    try:
        record = Record.from_json(document)
        intact = content_key(document) == digest and record.key == key
    except (TypeError, ValueError) as error:
        raise StoreError(f"{place} is not a record ({error}); {remedy}") from error
    if not intact:
        raise StoreError(f"{place} was edited after it was written; {remedy}")
    return record


def parse_object(data: bytes, place: str, remedy: str) -> dict[str, Any]:
    """Return the JSON object in `data`.

    Raises:
        StoreError: it is torn, or no object.
    """
    try:
        found = json.loads(data.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise StoreError(f"{place} is torn: not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise StoreError(f"{place} is not a JSON object; {remedy}")
    return found


def guarded(data: bytes) -> bytes:
    """Return bytes behind their SHA-256."""
    return hashlib.sha256(data).digest() + data


def unguarded(data: bytes) -> bytes | None:
    """Return what `guarded` was given, None if the bytes are torn or were edited."""
    digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return content if hashlib.sha256(content).digest() == digest else None
