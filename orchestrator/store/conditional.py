"""Whether a storage can hold a store at all: whether it writes only once what it should."""

from __future__ import annotations

import uuid

from dipgo_core.errors import StoreError
from orchestrator.store.backend import Backend


def check_backend(backend: Backend) -> None:
    """See that what is written can be read, and that `put_if_absent` writes only once.

    Raises:
        StoreError: it cannot, or the storage ignores the condition: then work would be paid twice.
    """
    name = f"probes/{uuid.uuid4().hex}"
    try:
        first = backend.put_if_absent(name, b"first")
        second = backend.put_if_absent(name, b"second")
        found = backend.get(name)
    finally:
        backend.delete(name)
    if not first or second or found != b"first":
        raise StoreError(
            f"storage {backend.url} overwrites what it was told to write only if absent (S3: it "
            "ignores If-None-Match, see docs/store.md): records would not be safe there; use a "
            "storage that has conditional writes, or a folder"
        )
