"""Probes: whether every node sees the same storage."""

from __future__ import annotations

import uuid

from dipgo_core.errors import StoreError
from orchestrator.store.names import check_part
from orchestrator.store.store import Store


def write_probe(store: Store) -> str:
    """Write something small and return its name; `read_probe` finds it in the same storage.

    Raises:
        StoreError: this machine cannot write there.
    """
    token = uuid.uuid4().hex
    store.backend.put(_name(token), token.encode())
    return token


def read_probe(store: Store, token: str) -> None:
    """See what `write_probe` wrote, maybe on another machine.

    Raises:
        StoreError: it is not there: the machines see different storages.
    """
    if store.backend.get(_name(token)) != token.encode():
        raise StoreError(
            f"{store.url} lacks what another machine wrote there a moment ago: it is not the same "
            "storage on every node; set `storage` to a folder that all have mounted at that path"
        )


def echo_probe(store: Store, token: str) -> str:
    """Read what another machine wrote, and write something for it to read."""
    read_probe(store, token)
    return write_probe(store)


def drop_probe(store: Store, token: str) -> None:
    store.backend.delete(_name(token))


def _name(token: str) -> str:
    return f"probes/{check_part(token)}"
