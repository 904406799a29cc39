"""Keys of tasks that share most of their inputs: what they share is written out once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from orchestrator.records import TaskKind, canonical_text, digest_of


class SharedTexts:
    """Canonical texts of mappings and lists, by the object: the same one is written once.

    It holds on to every object it was given, which nobody may change.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}

    def key(self, kind: TaskKind, inputs: Mapping[str, Any]) -> str:
        """Return what ``content_key({"kind": kind, "inputs": inputs})`` does."""
        fields = (f"{json.dumps(name)}:{self._text(inputs[name])}" for name in sorted(inputs))
        return digest_of(f'{{"inputs":{{{",".join(fields)}}},"kind":{json.dumps(kind)}}}')

    def _text(self, value: Any) -> str:
        if not isinstance(value, (dict, list)):
            return canonical_text(value)
        known = self._known.get(id(value))
        if known is None:
            known = self._known[id(value)] = (value, canonical_text(value))
        return known[1]
