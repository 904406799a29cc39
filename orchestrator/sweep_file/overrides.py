"""``-o a.b.c=value`` on top of a sweep file, and a model's `overrides` on top of its sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from orchestrator.sweep_issues import Issues, SweepIssue
from orchestrator.yaml_source import MAX_DEPTH, Node, absent, join, parse_yaml

#: Mappings that say one thing; an override replaces them whole.
REPLACED_WHOLE = ("prompts", "reference", "consistency")


def apply_overrides(root: Node, overrides: Sequence[str], issues: Issues) -> Node:
    """Return `root` with each ``path=value`` set; a value is read like YAML in the file.

    Entries of lists are named by index (``models.0.sampler.steps=10``). Keys that are not there
    yet are made; whether they exist at all is checked with the file.
    """
    for override in overrides:
        path, equals, text = override.partition("=")
        source = f"-o {override}"
        parts = path.strip().split(".")
        if not equals or not all(parts):
            rule = "must be key=value, such as evaluate.images=500"
            issues.add(SweepIssue(source, 0, 0, "", rule))
        elif len(parts) > MAX_DEPTH:
            issues.add(SweepIssue(source, 0, 0, "", f"keys nest at most {MAX_DEPTH} deep"))
        else:
            value = parse_yaml(
                text, source=source, issues=issues, path=".".join(parts), placed=False
            )
            root = root if value is None else _with(root, parts, value, issues)
    return root


def _with(node: Node, parts: Sequence[str], value: Node, issues: Issues) -> Node:
    if not parts:
        return value
    name, rest = parts[0], parts[1:]
    if isinstance(node.value, tuple):
        return _with_entry(node, name, rest, value, issues)
    children = node.value
    if isinstance(children, str) and _is_model(node):
        children = {"id": node}
    if children is None:
        children = {}
    if not isinstance(children, Mapping):
        rule = f"{node.path} is one value, it has no {name!r}; set {node.path} itself"
        issues.add(value.issue(rule))
        return node
    child = children.get(name) or absent(join(node.path, name), value.source)
    return replace(node, value={**children, name: _with(child, rest, value, issues)})


def _with_entry(node: Node, name: str, rest: Sequence[str], value: Node, issues: Issues) -> Node:
    assert isinstance(node.value, tuple)
    entries = list(node.value)
    if not (name.isascii() and name.isdigit() and int(name) < len(entries)):
        rule = f"{node.path} is a list of {len(entries)}, its entries are 0 to {len(entries) - 1}"
        issues.add(value.issue(f"{rule}, got {name!r}"))
        return node
    entries[int(name)] = _with(entries[int(name)], rest, value, issues)
    return replace(node, value=tuple(entries))


def _is_model(node: Node) -> bool:
    """Whether `node` is an entry of `models`, where a bare text is an id."""
    parent, _, index = node.path.partition(".")
    return parent == "models" and index.isdigit()


def merge(base: Node, over: Node | None) -> Node:
    """Return `base` with what `over` gives: mappings merge key by key, all else is replaced."""
    if over is None:
        return base
    if not isinstance(base.value, Mapping) or not isinstance(over.value, Mapping):
        return over
    merged = dict(base.value)
    for name, node in over.value.items():
        known = merged.get(name)
        whole = known is None or name in REPLACED_WHOLE
        merged[name] = node if whole or known is None else merge(known, node)
    return replace(base, value=merged)
