"""A protocol in words: what decides a figure, for people. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: As many digits of a hash tell the protocols of one sweep apart.
DIGITS = 10

REFERENCES: Mapping[str, str] = {
    "dense": "the dense model's images of the same noise",
    "statistics": "feature statistics from a file",
    "folder": "a folder of images",
}


def short(digest: str) -> str:
    """Return the first digits of a hash, as it is shown."""
    return digest[:DIGITS]


def protocol_rows(fields: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return (what, words) for everything in a protocol.

    fields: `Protocol.to_json`.
    """
    each = f"sha256 {short(fields['items_sha256'])}"
    images = f"n = {fields['images']}, {fields['width']} × {fields['height']} pixels"
    rows = [
        ("prompts or labels", f"{fields['num_items']} of the {fields['split']} split, {each}"),
        ("images", f"{images}, noise from seed {fields['seed']}, one noise an image"),
        ("sampler of the dense run", _sampler(fields["sampler"])),
        ("data type", str(fields["dtype"])),
        ("metrics", ", ".join(fields["metrics"]) or "none"),
    ]
    for role, scorer in fields["scorers"].items():
        words = f"{scorer['id']}, weights {_digest(scorer['digest'])}, input: {scorer['resize']}"
        rows.append((f"scorer of {role.replace('_', ' ')}", words))
    kind, _, digest = fields["reference"].partition(":")
    known = f", sha256 {short(digest)}" if digest else ""
    rows.append(("reference", REFERENCES[kind] + known))
    if fields["kid_subset_size"]:
        rows.append(("KID", f"subsets of {fields['kid_subset_size']} images"))
    if "tile" in fields:
        rows.append(("decoded", f"in tiles of {fields['tile']} pixels, which are blended"))
    rows.append(("safety checker", "on" if fields["safety_checker"] else "off"))
    return tuple(rows)


def _sampler(sampler: Mapping[str, Any]) -> str:
    named = [
        f"{name.replace('_', ' ')} {value}" for name, value in sampler.items() if value is not None
    ]
    return ", ".join(named)


def _digest(digest: str) -> str:
    """Shorten a SHA-256; a hub digest says its id and revision, and stays whole."""
    return digest if digest.startswith("hub:") else f"sha256 {short(digest)}"
