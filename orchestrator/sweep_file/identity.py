"""Which model an `id` names: bundled, known, on the hub, or in a local folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import UnknownModelError, nearest
from dipgo_core.families import (
    FAMILIES,
    KNOWN_MODELS,
    Family,
    KnownModel,
    Scorers,
    family_of_pipeline,
    find_known,
)
from orchestrator.sweep_file.context import HUB_ID, Context
from orchestrator.sweep_issues import Issues
from orchestrator.yaml_source import Node


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What is known of a model before anything is loaded. `id` opens from the current folder."""

    id: str
    family: Family
    sampler: SamplerSettings
    scorers: Scorers
    bundled: bool = False
    hub: bool = False


def identify(node: Node, family: str | None, issues: Issues, context: Context) -> Identity | None:
    """Return what the id at `node` names; `family` is the one the entry gives, if any."""
    name = str(node.value)
    known = find_known(name)
    if known is not None:
        return _known(known, node, family, issues)
    folder = context.locate(name)
    if folder is not None or name.startswith((".", "/", "~")):
        return _in_folder(folder or name, node, family, issues)
    if not HUB_ID.fullmatch(name):
        valid = tuple(known.id for known in KNOWN_MODELS)
        rule = f"{name!r} is no bundled model, hub id (owner/name) or folder.{nearest(name, valid)}"
        issues.add(node.issue(rule))
        return None
    if family is None:
        rule = f"{name} is not among the known models; give its `family` ({', '.join(FAMILIES)})"
        issues.add(node.issue(rule))
        return None
    return _of_family(name, FAMILIES[family], hub=True)


def _known(known: KnownModel, node: Node, family: str | None, issues: Issues) -> Identity:
    if family not in (None, known.family):
        issues.add(node.issue(f"{known.id} is of family {known.family}, not {family}"))
    return Identity(
        id=known.id,
        family=FAMILIES[known.family],
        sampler=known.sampler,
        scorers=known.scorers,
        bundled=known.bundled,
        hub=not known.bundled,
    )


def _of_family(name: str, family: Family, *, hub: bool) -> Identity:
    return Identity(id=name, family=family, sampler=family.sampler, scorers=family.scorers, hub=hub)


def _in_folder(folder: str, node: Node, family: str | None, issues: Issues) -> Identity | None:
    try:
        pipeline = _pipeline_class(Path(folder))
        found = family_of_pipeline(pipeline)
    except (OSError, ValueError) as error:
        rule = f"no pipeline in folder {folder}: model_index.json cannot be read ({error})"
        issues.add(node.issue(rule))
        return None
    except UnknownModelError as error:
        issues.add(node.issue(str(error)))
        return None
    if family not in (None, found.name):
        issues.add(node.issue(f"{folder} is of family {found.name}, not {family}"))
    return _of_family(folder, found, hub=False)


def _pipeline_class(folder: Path) -> str:
    """Return the class name in a folder's model_index.json.

    Raises:
        OSError: the file cannot be read. ValueError: it is not the index of a pipeline.
    """
    index: Any = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise ValueError("it has no _class_name")
    return name
