"""Revisions on the hub: a commit each, unless the file allows what moves."""

from __future__ import annotations

from collections.abc import Mapping

from dipgo_core.config import ModelSettings
from dipgo_core.evaluation.metrics import roles_of
from dipgo_core.evaluation.scorers import hub_revisions, hub_scorer
from dipgo_core.hub import is_commit, split_id
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import EvaluateSettings, PromptSource
from orchestrator.yaml_source import Node, join


def check_model_pin(place: Node, path: str, revision: str | None, issues: Issues) -> None:
    """Report a model whose revision is no commit."""
    if not is_commit(revision):
        issues.add(place.issue(_rule(place, revision), path=join(path, "revision")))


def check_base_pin(place: Node, path: str, base: ModelSettings, issues: Issues) -> None:
    """Report the base of a model, written or meant by default, whose revision is no commit."""
    if not is_commit(base.revision):
        rule = f"{_rule(place, base.revision)} (as base: {base.id}@<commit>)"
        issues.add(place.issue(rule, path=join(path, "base")))


def check_prompt_pin(section: Node, source: PromptSource, issues: Issues) -> None:
    """Report prompts of a hub data set whose revision is no commit; `section` holds them."""
    if source.kind != "hub" or not source.value or is_commit(source.revision):
        return
    place = _child(section, "prompts")
    path = join(join(section.path, "prompts"), "revision")
    issues.add(place.issue(_rule(place, source.revision), path=path))


def check_scorer_pins(section: Node, evaluate: EvaluateSettings, issues: Issues) -> None:
    """Report scorers on the hub without a commit, written in `section` or meant by default."""
    scorers = _child(section, "scorers")
    for role in roles_of(evaluate.metrics):
        name = getattr(evaluate.scorers, role)
        if name is None or not hub_scorer(name):
            continue
        (hub_id, _), *more = parts = hub_revisions(role, name)
        if not all(is_commit(revision) for _, revision in parts):
            place = _child(scorers, role)
            commits = "+".join(["<commit>", *(f"<commit of {other}>" for other, _ in more)])
            rule = f"{_rule(place, split_id(name)[1])} (as {role}: {hub_id}@{commits})"
            issues.add(place.issue(rule, path=join(join(section.path, "scorers"), role)))


def _rule(place: Node, revision: str | None) -> str:
    rule = f"must name a commit (40 hexadecimal digits), got {revision or 'none'}"
    return f"{rule}; `dipgo-sweep pin {place.source}` writes it, or set allow_unpinned: true"


def _child(node: Node, name: str) -> Node:
    """Return where an issue about `name` belongs: its value, or this mapping."""
    return node.value.get(name, node) if isinstance(node.value, Mapping) else node
