"""open_store: from a URL to a store."""

from __future__ import annotations

import os
from pathlib import Path

from dipgo_core.errors import StoreError
from orchestrator.store.folder import FolderBackend
from orchestrator.store.store import Store


def open_store(url: str | os.PathLike[str]) -> Store:
    """Open the store at `url`, a folder that every worker can reach (created if absent).

    Raises:
        StoreError: a URL of a kind that is not supported, or a path that is no writable folder.
    """
    text = os.fspath(url)
    scheme, separator, rest = text.partition("://")
    if separator and scheme != "file":
        raise StoreError(
            f"storage {text!r}: {scheme}:// is not supported; use a folder that every worker "
            "can reach, such as ./.dipgo or a path on a shared file system"
        )
    return Store(FolderBackend(Path(rest if separator else text)))
