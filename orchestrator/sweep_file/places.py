"""What may be written into a sweep file for a place: where results are kept, and how runs are
called in the tracking server."""

from __future__ import annotations

from typing import Final

from orchestrator.secrets import credentials_rule, redact

SCHEMES: Final = ("file", "s3")
#: Bytes of a whole path, and of one part of it, that file systems take.
LONGEST_PATH: Final = 4000
LONGEST_PART: Final = 255
LONGEST_EXPERIMENT: Final = 200  # with room for what it becomes as the name of a folder


def printable_rule(value: str) -> str | None:
    """Return the rule that a text of one line breaks, or None."""
    if value.isprintable():
        return None
    return f"must have no control or invisible characters, got {redact(value)[:60]!r}"


def storage_rule(value: str) -> str | None:
    """Return the rule that a place of storage breaks, or None."""
    scheme, separator, rest = value.partition("://")
    rule = printable_rule(value) or credentials_rule(value)
    if rule is None and separator and scheme not in SCHEMES:
        rule = f"must be a folder, or a URL of {' or '.join(SCHEMES)}, got {scheme}://"
    if rule is None and _is_too_long(rest if separator else value):
        rule = f"must have at most {LONGEST_PATH} bytes, {LONGEST_PART} between two '/'"
    return rule


def experiment_rule(value: str) -> str | None:
    """Return the rule that the name of an experiment breaks, or None."""
    rule = printable_rule(value)
    if rule is None and len(value.encode()) > LONGEST_EXPERIMENT:
        rule = f"must have at most {LONGEST_EXPERIMENT} bytes, got {len(value.encode())}"
    if rule is None and any(part in (".", "..") for part in value.split("/")):
        rule = f"must have no part '.' or '..', got {value!r}"
    return rule


def _is_too_long(path: str) -> bool:
    parts = (len(part.encode()) for part in path.split("/"))
    return len(path.encode()) > LONGEST_PATH or max(parts) > LONGEST_PART
