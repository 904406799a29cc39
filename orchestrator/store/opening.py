"""open_store: from a URL to a store."""

from __future__ import annotations

import os
from pathlib import Path

from dipgo_core.errors import StoreError
from orchestrator.secrets import redact
from orchestrator.store.folder import FolderBackend
from orchestrator.store.s3 import S3Backend
from orchestrator.store.store import Store


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store at `url`, which every worker can reach: a folder, or s3://BUCKET/PREFIX.

    A folder is created if it is absent; a bucket is not asked before something is read or written.

    Raises:
        StoreError: a URL of a kind that is not supported, or with credentials in it, or a path
            that is no writable folder.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if not separator or scheme == "file":
        return Store(FolderBackend(Path(rest if separator else text)))
    if scheme == "s3":
        return Store(S3Backend(text))
    raise StoreError(
        f"storage {redact(text)!r}: {scheme}:// is not supported; use a folder that every worker "
        "can reach, such as ./.dipgo or a path on a shared file system, or s3://BUCKET/PREFIX"
    )
