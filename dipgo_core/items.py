"""Item: what one image is generated from. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Item:
    """One prompt, with the class label that label-conditional models use instead."""

    prompt: str
    label: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Item:
        return cls(prompt=data["prompt"], label=data.get("label"))
