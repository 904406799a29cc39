"""Which model an `id` names: bundled, known, on the hub, or in a local folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dipgo_core.config import SamplerSettings
from dipgo_core.errors import ModelFilesError, UnknownModelError, nearest
from dipgo_core.families import (
    FAMILIES,
    KNOWN_MODELS,
    NOISE_SCHEDULERS,
    Family,
    KnownModel,
    Scorers,
    family_of,
    find_family,
    find_known,
)
from dipgo_core.families.fallback import own_sampler
from dipgo_core.hub import split_id
from dipgo_core.model_base import is_file_name, is_partial, needs_base, single_file
from orchestrator.sweep_file.context import HUB_ID, Context
from orchestrator.sweep_issues import Issues
from orchestrator.yaml_source import Node


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What is known of a model before anything is loaded. `id` and `base` open from the current
    folder; base: ``owner/name@revision`` on the hub, None where the id is a whole pipeline."""

    id: str
    family: Family
    sampler: SamplerSettings
    scorers: Scorers
    bundled: bool = False
    hub: bool = False
    base: str | None = None


def identify(
    node: Node, family: str | None, issues: Issues, context: Context, base: Node | None = None
) -> Identity | None:
    """Return what the id at `node` names; `family` and `base` are those the entry gives, if any."""
    if base is not None or is_file_name(str(node.value)):
        return _on_base(node, base, family, issues, context)
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
    return _of_family(name, find_family(family), hub=True)


def _on_base(
    node: Node, base: Node | None, family: str | None, issues: Issues, context: Context
) -> Identity | None:
    """Return a single file, or a denoiser alone, with what its base is."""
    name = str(node.value)
    if base is None:
        issues.add(node.issue(needs_base(name)))
        return None
    hub_id, revision = split_id(str(base.value))
    rest = identify(replace(base, value=hub_id), family, issues, context)
    found = context.locate(name)
    here = found is not None or is_file_name(name) or name.startswith((".", "/", "~"))
    try:
        file = single_file(found or name)
    except ModelFilesError as error:
        issues.add(node.issue(str(error)))
        return None
    if rest is None:
        return None
    if is_partial(rest.id):
        issues.add(base.issue(f"{rest.id} is no whole pipeline itself"))
        return None
    if file is None and not here and not HUB_ID.fullmatch(name):
        issues.add(node.issue(f"{name!r} is no file of safetensors, folder or hub id (owner/name)"))
        return None
    whole = rest.id if revision is None else f"{rest.id}@{revision}"
    known = find_known(name)
    return replace(
        rest,
        id=found or name,
        base=whole,
        hub=not here,
        bundled=False,
        sampler=rest.sampler if known is None else known.sampler,
    )


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
        pipeline, components = _classes(Path(folder))
        found = family_of(pipeline, components)
    except (OSError, ValueError) as error:
        rule = f"no pipeline in folder {folder}: model_index.json cannot be read ({error})"
        issues.add(node.issue(rule))
        return None
    except UnknownModelError as error:
        issues.add(node.issue(str(error)))
        return None
    if family not in (None, found.name):
        issues.add(node.issue(f"{folder} is of family {found.name}, not {family}"))
    if pipeline in found.pipelines[found.searchable :]:
        rule = (
            f"{pipeline} makes images of more than a prompt; search the model of "
            f"{' or '.join(found.pipelines[: found.searchable])}: its SubNets run in {pipeline} too"
        )
        issues.add(node.issue(rule))
        return None
    if found.name in FAMILIES:
        return _of_family(folder, found, hub=False)
    sampler = own_sampler(components.get("scheduler", ""))
    if sampler is None:
        valid = ", ".join(NOISE_SCHEDULERS)
        rule = (
            f"{pipeline} is in no family, and its noise scheduler {components.get('scheduler')} is "
            f"none of {valid}: this model cannot be searched"
        )
        issues.add(node.issue(rule))
        return None
    only = replace(found, schedulers=(sampler.scheduler,), sampler=sampler)
    return _of_family(folder, only, hub=False)


def _classes(folder: Path) -> tuple[str, dict[str, str]]:
    """Return the class names in a folder's model_index.json: the pipeline's, and its components'.

    Raises:
        OSError: the file cannot be read. ValueError: it is not the index of a pipeline.
    """
    index: Any = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str):
        raise ValueError("it has no _class_name")
    named = {part: origin[1] for part, origin in index.items() if _is_class(origin)}
    return name, named


def _is_class(origin: Any) -> bool:
    return isinstance(origin, list) and len(origin) == 2 and isinstance(origin[1], str)
