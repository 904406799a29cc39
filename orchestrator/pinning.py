"""Commits written into a sweep file: only revisions change, everything else stays byte for byte."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dipgo_core.errors import ConfigError, SweepFileError
from dipgo_core.evaluation.metrics import Role
from dipgo_core.hub import MAIN
from orchestrator.facts import refusal, scorer_names
from orchestrator.hub_needs import (
    Commits,
    HubNeed,
    hub_needs,
    pinned_base,
    pinned_scorer,
    resolve_needs,
    revision_key,
    with_commits,
)
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_file.overrides import merge
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import PromptSource, SweepFile, SweepModel
from orchestrator.yaml_source import Node, absent, parse_yaml, resolve

_ALLOWED: Final = ("allow_unpinned=true",)
_FORBIDDEN: Final = ("allow_unpinned=false",)
_ANCHOR: Final = re.compile(r"&\S+\s+")

#: What is to be written: keys to texts or further keys.
Tree = Mapping[str, "str | Tree"]


@dataclass(frozen=True, kw_only=True)
class Pinned:
    """What had no commit, with the commit it is now. loose: whether the file still allows what
    moves, though nothing in it does."""

    needs: tuple[tuple[HubNeed, str], ...]
    loose: bool

    def to_json(self) -> dict[str, Any]:
        return {
            "pinned": [
                {
                    "kind": need.kind,
                    "id": need.id,
                    "revision": need.revision or MAIN,
                    "commit": commit,
                    "used_by": list(need.users),
                }
                for need, commit in self.needs
            ],
            "allow_unpinned_can_be_false": self.loose,
        }


@dataclass(frozen=True, order=True)
class Edit:
    """Characters start to end of the text become `text`."""

    start: int
    end: int
    text: str


def pin_file(path: Path, *, write: bool = True) -> Pinned:
    """Write the commit of every hub revision of a sweep file that has none, into the file itself.

    write: False only tells what would be written.

    Raises:
        SweepFileError: the file has errors.
        PreflightError: something cannot be resolved; nothing is written.
        ConfigError: the file is written in a way that cannot be edited; nothing is written.
    """
    sweep = load_sweep(path, _ALLOWED)
    needs = [need for need in hub_needs(sweep) if not need.pinned]
    commits, problems = resolve_needs(needs)
    if problems:
        raise refusal(sweep, problems, "pinned")
    if needs and write:
        text = path.read_bytes().decode("utf-8")  # a mark at its beginning stays
        _replace(path, _edited(text, path, sweep, commits), with_commits(sweep, commits))
    return Pinned(
        needs=tuple((need, commits[need.key]) for need in needs),
        loose=_is_strict(path) and load_sweep(path).allow_unpinned,
    )


def _is_strict(path: Path) -> bool:
    try:
        load_sweep(path, _FORBIDDEN)
    except SweepFileError:
        return False
    return True


def _replace(path: Path, text: str, expected: SweepFile) -> None:
    """Write the file, after making sure that it says what it said, with commits."""
    trial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        trial.write_bytes(text.encode())
        if load_sweep(trial, _ALLOWED) != expected:
            raise ConfigError(_by_hand(path, "it would mean something else with commits in it"))
        shutil.copymode(path, trial)
        target = path.resolve()
        if target.parent != trial.parent.resolve():
            trial = Path(shutil.move(trial, target.with_name(trial.name)))
        trial.replace(target)
    except SweepFileError as error:
        raise ConfigError(_by_hand(path, f"with commits in it, it has {error}")) from error
    finally:
        trial.unlink(missing_ok=True)


def _by_hand(path: Path, reason: str) -> str:
    return f"{path} is left as it is, {reason}: write the commits that `--dry-run` lists by hand"


# --- what to write where -------------------------------------------------------------------------


def _edited(text: str, path: Path, sweep: SweepFile, commits: Commits) -> str:
    mark = "\ufeff" if text.startswith("\ufeff") else ""
    body = text.removeprefix(mark)
    root = parse_yaml(body, source=str(path), issues=Issues())
    assert root is not None and isinstance(root.value, Mapping)  # it has just been loaded
    edits = set(_Editor(body, path).edits(root, sweep, commits))
    places = [(edit.start, edit.end) for edit in edits]
    if len(set(places)) < len(places):
        raise ConfigError(_by_hand(path, "one value (an alias) would need two commits"))
    for edit in sorted(edits, reverse=True):
        body = body[: edit.start] + edit.text + body[edit.end :]
    return mark + body


class _Editor:
    """Finds the edits of one text."""

    def __init__(self, text: str, path: Path) -> None:
        self._text = text
        self._path = path
        self._newline = "\r\n" if "\r\n" in text else "\n"

    def edits(self, root: Node, sweep: SweepFile, commits: Commits) -> Iterator[Edit]:
        shared = _shared_scorers(sweep, commits)
        tree: dict[str, str] = {}
        for entry, model in _entries(root, sweep):
            evaluate, search = _section(root, entry, "evaluate"), _section(root, entry, "search")
            calibration = _child(search, "calibration")
            yield from self._prompts(evaluate, model.evaluate.prompts, commits)
            yield from self._prompts(calibration, model.calibration.prompts, commits)
            defaults: dict[str, str] = {}
            for role, name in _unpinned_scorers(model, commits).items():
                node = _child(_child(evaluate, "scorers"), role)
                if isinstance(node.value, str):
                    yield self._scalar(node, name)
                else:
                    (tree if role in shared else defaults)[role] = name
            yield from self._model(entry, model, defaults, commits)
        if tree:
            yield from self._put(root, {"evaluate": {"scorers": tree}})

    def _model(
        self, entry: Node, model: SweepModel, scorers: Tree, commits: Commits
    ) -> Iterator[Edit]:
        key = revision_key(model.settings.id, model.settings.revision, "model")
        tree: dict[str, str | Tree] = {"revision": commits[key]} if key in commits else {}
        base = pinned_base(model.settings, commits)
        if base is not None and base != model.settings.base:
            tree["base"] = base
        if scorers:
            tree["overrides"] = {"evaluate": {"scorers": scorers}}
        if not tree:
            return
        if isinstance(entry.value, str):
            written = self._raw(entry)
            yield Edit(*entry.span, _flow({"id": written, **tree}))
        else:
            yield from self._put(entry, tree, after="id", written="revision" in tree)

    def _prompts(self, section: Node, source: PromptSource, commits: Commits) -> Iterator[Edit]:
        key = revision_key(source.value, source.revision, "dataset")
        if source.kind == "hub" and key in commits:
            prompts = _child(section, "prompts")
            yield from self._put(prompts, {"revision": commits[key]}, after="hub")

    def _put(
        self, node: Node, tree: Tree, *, after: str | None = None, written: bool = True
    ) -> Iterator[Edit]:
        """Write `tree` into a mapping. after: the key behind which new keys go, whose value decides
        the commit (`written`), so that it must stand in the file."""
        assert isinstance(node.value, Mapping)
        new: dict[str, str | Tree] = {}
        if after is not None and written:
            self._raw(node.value[after])
        for key, value in tree.items():
            child = node.value.get(key)
            if child is None:
                new[key] = value
            elif isinstance(child.value, Mapping) and not isinstance(value, str):
                yield from self._put(child, value)
            else:
                yield self._scalar(child, _flow(value))
        if new:
            yield self._new_keys(node, new, after)

    def _new_keys(self, node: Node, new: Tree, after: str | None) -> Edit:
        assert isinstance(node.value, Mapping)
        lines = [f"{key}: {_flow(value)}" for key, value in new.items()]
        first = next(iter(node.value.values()), None)
        if first is None:
            return Edit(node.span[1], node.span[1], ", ".join(lines))
        if node.path == "" and not node.flow:
            gap = "" if self._text.endswith("\n") else self._newline
            end = len(self._text)
            return Edit(end, end, gap + self._newline.join([*lines, ""]))
        anchor = first if after is None else node.value[after]
        if node.flow and after is not None:
            return Edit(anchor.span[1], anchor.span[1], "".join(f", {line}" for line in lines))
        indent = self._newline + " " * (anchor.key_column - 1)
        if after is not None:
            end = self._end_of_line(anchor.span[1])
            return Edit(end, end, "".join(indent + line for line in lines))
        rest = ", " if node.flow else indent
        return Edit(first.key_start, first.key_start, "".join(line + rest for line in lines))

    def _end_of_line(self, start: int) -> int:
        end = self._text.find("\n", start)
        end = len(self._text) if end < 0 else end
        return end - 1 if end and self._text[end - 1] == "\r" else end

    def _scalar(self, node: Node, text: str) -> Edit:
        """Replace a value; an anchor before it stays."""
        start, end = node.span
        raw = self._raw(node)
        anchor = _ANCHOR.match(raw)
        start += anchor.end() if anchor else 0
        return Edit(start, end, text if raw else f" {text}")

    def _raw(self, node: Node) -> str:
        """Return a value as the file writes it.

        Raises:
            ConfigError: it comes from the environment.
        """
        raw = self._text[slice(*node.span)]
        if "${" in raw:
            reason = f"{node.path} comes from the environment ({raw}), on which a commit depends"
            raise ConfigError(_by_hand(self._path, reason))
        return raw


def _entries(root: Node, sweep: SweepFile) -> Iterator[tuple[Node, SweepModel]]:
    """Return each entry of `models` with the first of the models that it stands for."""
    entries = _child(root, "models").value
    assert isinstance(entries, tuple)
    models = iter(sweep.models)
    for entry in entries:
        sampler = _child(entry, "sampler").value
        found = [next(models) for _ in range(len(sampler) if isinstance(sampler, tuple) else 1)]
        yield entry, found[0]


def _section(root: Node, entry: Node, name: str) -> Node:
    """Return a section as a model sees it: its own over that of the file."""
    over = _child(_child(entry, "overrides"), name)
    return merge(_child(root, name), None if over.value is None else over)


def _child(node: Node, name: str) -> Node:
    known = node.value.get(name) if isinstance(node.value, Mapping) else None
    return absent(name, node.source) if known is None else known


def _unpinned_scorers(model: SweepModel, commits: Commits) -> dict[Role, str]:
    """Return the scorers of a model that have no commit, with it."""
    found: dict[Role, str] = {}
    for role, name in scorer_names(model).items():
        pinned = pinned_scorer(role, name, commits)
        if pinned != name:
            found[role] = pinned
    return found


def _shared_scorers(sweep: SweepFile, commits: Commits) -> set[Role]:
    """Return the roles in which every model of the sweep uses the same unpinned scorer."""
    each = [_unpinned_scorers(model, commits) for model in sweep.models]
    first = each[0]
    return {role for role in first if all(one.get(role) == first[role] for one in each)}


def _flow(value: str | Tree) -> str:
    """Return a value as YAML on one line; a commit of digits alone is text all the same."""
    if isinstance(value, str):
        return value if isinstance(resolve(value), str) else f'"{value}"'
    return "{" + ", ".join(f"{key}: {_flow(inner)}" for key, inner in value.items()) + "}"
