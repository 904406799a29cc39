"""Nodes know their places; hostile documents are refused. Oracle: lines counted by hand, PyYAML."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.sweep_issues import Issues
from orchestrator.yaml_source import MAX_BYTES, Node, Unreadable, parse_yaml, resolve


def parsed(text: str, **environment: str) -> tuple[Node | None, list[str]]:
    issues = Issues()
    node = parse_yaml(text, source="f", issues=issues, environment=environment)
    return node, [str(issue) for issue in issues.error().errors]


def plain(node: Node) -> Any:
    if isinstance(node.value, tuple):
        return [plain(item) for item in node.value]
    if isinstance(node.value, dict):
        return {name: plain(item) for name, item in node.value.items()}
    return node.value


def test_node_knows_value_and_key_places() -> None:
    node, _ = parsed("a:\n  b: [1,\n      two]\n")
    assert node is not None and isinstance(node.value, dict)
    inner = node.value["a"].value["b"]  # type: ignore[index, union-attr]
    assert (inner.path, inner.key_line, inner.key_column) == ("a.b", 2, 3)
    second = inner.value[1]  # type: ignore[index]
    assert (second.path, second.line, second.column) == ("a.b.1", 3, 7)


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("12:30", "12:30"), ("no", "no"), ("on", "on"), ("true", True), ("~", None)]
    + [("007", 7), ("-3", -3), (".5", 0.5), ("1_000", "1_000"), ("0x10", "0x10"), ("5.", 5.0)],
)
def test_unquoted_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


def test_quoted_scalars_stay_text() -> None:
    node, _ = parsed("[\"500\", 'true', '']")
    assert node is not None and plain(node) == ["500", "true", ""]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**17), 10**17) | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, max_size=3)
        ),
        max_leaves=10,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_yaml_dumps_reads_back(value: Any) -> None:
    node, issues = parsed(yaml.safe_dump(value))
    assert issues == [] and node is not None and plain(node) == value


@pytest.mark.parametrize(
    ("text", "issue"),
    [
        ("a: 1\nb: 2\na: 3\n", "f:3:1: a: key 'a' is already given on line 1; keep one"),
        ("a: [1\nb: 2", "f:2:2: not YAML: expected ',' or ']', but got ':' (while"),
        ("a: !!python/object:os.system x", "f:1:4: a: tags (!...) are not read"),
        ("a: *b", "f:1:4: a: alias *b has no anchor before it"),
        ("a: &a [*a]", "f:1:8: a.0: alias *a has no anchor before it"),
        ("a: 1\n---\nb: 2", "f:2:1: one file holds one document"),
        ("? [1, 2]\n: 3", "f:1:3: keys are plain words"),
        ("a: {<<: 3}", "f:1:5: a: merge keys (<<) are not read"),
        ("a: ${X}", "f:1:4: a: environment variable X is not set"),
        ("a: \x07", "f: not YAML"),
        ("[" * 100, "f:1:18: 0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0: values nest at most 16 deep"),
        ("a" * (MAX_BYTES + 1), "f: a sweep file has at most 131072 bytes"),
    ],
)
def test_broken_documents_say_where(text: str, issue: str) -> None:
    _, issues = parsed(text)
    assert issues[0].startswith(issue)


def test_variables_are_filled_in_and_typed() -> None:
    text = "[${A}, ${B:-5}, '${B:-5}', ${C:-}, x-${A}-${A}, ${EMPTY:-7}]"
    node, issues = parsed(text.replace("[", "- ").replace(", ", "\n- ")[:-1], A="2", EMPTY="")
    assert issues == [] and node is not None
    assert plain(node) == [2, 5, "5", None, "x-2-2", 7]


def test_unset_variable_is_unreadable_and_others_are_still_checked() -> None:
    node, issues = parsed("a: ${A}\nb: ${B}")
    assert node is not None and isinstance(plain(node)["a"], Unreadable)
    assert len(issues) == 2


def test_alias_is_a_copy_at_its_own_path() -> None:
    node, _ = parsed("a: &x {k: 1}\nb: *x")
    assert node is not None and isinstance(node.value, dict)
    copy = node.value["b"]
    assert plain(copy) == {"k": 1}
    assert copy.value["k"].path == "b.k"  # type: ignore[index, union-attr]
    assert (copy.line, copy.key_line) == (1, 2)


@pytest.mark.parametrize("width", [2, 10])
def test_alias_bomb_is_refused_at_once(width: int) -> None:
    lines = ["l0: &l0 [x]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * width)}]" for i in range(1, 40)]
    started = time.monotonic()
    _, issues = parsed("\n".join(lines))
    assert "at most" in issues[0]
    assert time.monotonic() - started < 5  # hang detector; takes well under a second
