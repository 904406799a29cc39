"""Names of what a store holds: the one place that decides which name may reach the storage."""

from __future__ import annotations

import re

from dipgo_core.errors import StoreError

#: Bytes of a whole name; S3 allows 1024 with the prefix, which is part of the URL.
LONGEST = 700

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
_KEY = re.compile(r"[0-9a-f]{64}")


def check_name(name: str) -> tuple[str, ...]:
    """Return the parts of a name such as ``records/<key>.json``.

    A part starts with a letter or a digit and has no other signs than ``. _ -``, so that no name is
    absolute, climbs (``..``), is hidden, or differs from another only by Unicode normal form.

    Raises:
        StoreError: the name breaks the rule, or is too long for a file system or for S3.
    """
    parts = tuple(name.split("/"))
    if len(name) > LONGEST or not all(_PART.fullmatch(part) for part in parts):
        shown = name if len(name) <= 80 else f"{name[:80]}…"
        raise StoreError(
            f"{shown!r} is no name in a store: parts separated by '/', each of 1 to 201 letters "
            f"(a-z, A-Z), digits and '._-', starting with a letter or a digit, {LONGEST} in all"
        )
    return parts


def check_part(name: str) -> str:
    """Return the name of one part, such as a sweep's or a file's.

    Raises:
        StoreError: it is none, or has several parts.
    """
    if len(check_name(name)) != 1:
        raise StoreError(f"{name!r} must be one name, without '/'")
    return name


def check_key(key: str) -> str:
    """Return the key.

    Raises:
        StoreError: it is not a SHA-256 in hexadecimal digits.
    """
    if not is_key(key):
        raise StoreError(f"{key[:80]!r} is not a key (64 hexadecimal digits, lower case)")
    return key


def is_key(text: str) -> bool:
    """Return whether a text is a SHA-256 as keys are written."""
    return _KEY.fullmatch(text) is not None
