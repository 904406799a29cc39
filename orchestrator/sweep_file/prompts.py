"""Where prompts or class labels come from: `prompts` of `evaluate` and of `search.calibration`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from orchestrator.sweep_file.context import Context, hub_rule, located
from orchestrator.sweep_file.fields import Fields, many, reject, text, whole
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import PromptSource
from orchestrator.yaml_source import Node

_SPLITS: Final = ("calibration", "test")


def read_prompts(section: Fields, issues: Issues, context: Context, split: str) -> PromptSource:
    """Read `prompts` of a section, or choose the default that fits the model."""
    node = section.child("prompts")
    if node is not None:
        source = _source(node, issues, context)
        if source is not None:
            _check_conditioning(node, source, issues, context)
            return source
    elif context.takes == "label":
        return PromptSource(kind="labels")
    elif context.takes == "prompt" and not context.bundled:
        section.demand(
            "prompts", hint=f"{context.name} needs a file, {{hub: owner/name}} or bundled:test"
        )
    return PromptSource(kind="bundled", value=split)


def _check_conditioning(node: Node, source: PromptSource, issues: Issues, context: Context) -> None:
    if context.takes == "label" and source.kind == "bundled":
        rule = f"model {context.name} takes class labels; give it overrides with `prompts: labels`"
        issues.add(node.issue(rule))
    if context.takes == "prompt" and source.kind == "labels":
        rule = f"model {context.name} takes text; give a file, {{hub: owner/name}} or bundled:test"
        issues.add(node.issue(rule))


def check_splits(node: Node, calibration: PromptSource, test: PromptSource, issues: Issues) -> None:
    """Report prompts that searches and evaluations share; `node` is the section `evaluate`."""
    if calibration.kind != "labels" and replace(calibration, rows=None) == replace(test, rows=None):
        rule = "are those of search.calibration; a search must not see test prompts"
        place = node.value.get("prompts") if isinstance(node.value, Mapping) else None
        issues.add((place or node).issue(rule))


def _source(node: Node, issues: Issues, context: Context) -> PromptSource | None:
    """Read ``labels``, ``bundled:SPLIT``, a file, or a mapping with one of hub, file, labels."""
    value = node.value
    if isinstance(value, str) and value:
        return _named_prompts(node, value, issues, context)
    if not isinstance(value, Mapping):
        reject(node, issues, "must be a file, bundled:test, labels, or a mapping with hub or file")
        return None
    kind = next((kind for kind in _READERS if kind in value), None)
    if kind is None:
        issues.add(node.issue(f"needs one of {', '.join(_READERS)}"))
        return None
    with Fields(node, issues) as section:
        return _READERS[kind](section, context)


def _named_prompts(node: Node, value: str, issues: Issues, context: Context) -> PromptSource | None:
    if value == "labels":
        return PromptSource(kind="labels")
    kind, colon, split = value.partition(":")
    if kind == "bundled" and colon:
        if split in _SPLITS:
            return PromptSource(kind="bundled", value=split)
        reject(node, issues, "must be bundled:calibration or bundled:test")
        return None
    path = located(context, "file")(node, issues)
    return None if path is None else PromptSource(kind="file", value=path)


def _hub_prompts(section: Fields, context: Context) -> PromptSource:
    return PromptSource(
        kind="hub",
        value=section.need("hub", text(valid=hub_rule), ""),
        file=section.maybe("file", text()),
        column=section.maybe("column", text()),
        rows=section.maybe("rows", whole(1)),
        split=section.maybe("split", text()),
        config=section.maybe("config", text()),
        revision=section.maybe("revision", text()),
    )


def _file_prompts(section: Fields, context: Context) -> PromptSource:
    return PromptSource(
        kind="file",
        value=section.need("file", located(context, "file"), ""),
        column=section.maybe("column", text()),
        rows=section.maybe("rows", whole(1)),
    )


def _label_prompts(section: Fields, context: Context) -> PromptSource:
    labels = section.child("labels")
    if labels is not None and isinstance(labels.value, tuple):
        chosen = many(whole(0, 1_000_000))(labels, section.issues)
        return PromptSource(kind="labels", labels=chosen or ())
    return PromptSource(kind="labels", rows=section.maybe("labels", whole(1, 1_000_000)))


_READERS: Final[Mapping[str, Callable[[Fields, Context], PromptSource]]] = {
    "hub": _hub_prompts,
    "file": _file_prompts,
    "labels": _label_prompts,
}
