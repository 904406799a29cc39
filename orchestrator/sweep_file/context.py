"""Which model a section is read for, and where its relative paths start."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from dipgo_core.families import Conditioning, Scorers
from orchestrator.sweep_file.fields import Reader, text
from orchestrator.sweep_issues import Issues
from orchestrator.yaml_source import Node

HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BUNDLED_SCORERS: Final = Scorers(features="tiny-features", clip="tiny-clip", cmmd="tiny-clip")


@dataclass(frozen=True, kw_only=True)
class Context:
    """Which model a section is read for, and where relative paths start.

    takes: what the model is conditioned on; None = no model yet, whatever fits some model is fine.
    """

    folder: Path
    name: str = ""
    takes: Conditioning | None = None
    bundled: bool = False
    scorers: Scorers = _BUNDLED_SCORERS

    def locate(self, path: str) -> str | None:
        """Return a path that opens from here: as given, or beside the sweep file."""
        try:
            given = Path(path).expanduser()
            found = [place for place in (given, self.folder / given) if place.exists()]
        except (OSError, ValueError, RuntimeError):  # too long, a null byte, an unknown ~user
            return None
        return str(found[0]) if found else None


def located(context: Context, kind: Literal["file", "folder"]) -> Reader[str]:
    """Read a path that exists, here or beside the sweep file."""

    def read(node: Node, issues: Issues) -> str | None:
        path = text()(node, issues)
        if path is None:
            return None
        found = context.locate(path)
        good = found is not None and Path(found).is_dir() == (kind == "folder")
        if not good:
            issues.add(
                node.issue(f"no such {kind}: {path} (looked here and beside the sweep file)")
            )
        return found if good else None

    return read


def hub_rule(name: str) -> str | None:
    """Return the rule that `name` breaks as a hub id, or None."""
    return None if HUB_ID.fullmatch(name) else f"must be a hub id (owner/name), got {name!r}"
