"""YAML text → nodes that know where they stand: the only import of yaml.

Reads the part of YAML that a sweep file needs, strictly: one document, no tags, no repeated keys,
`true`/`false` as the only booleans, and bounds on size, depth and what aliases expand to.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import yaml

from orchestrator.sweep_issues import Issues, SweepIssue

MAX_BYTES: Final = 128 * 1024
MAX_NODES: Final = 10_000
MAX_DEPTH: Final = 16

_VARIABLE: Final = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_WHOLE: Final = re.compile(r"[-+]?[0-9]{1,18}")
_NUMBER: Final = re.compile(
    r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_OPEN_CALL: Final = re.compile(r"(uniform|loguniform|int|logint)\([^(),]*")
_WORDS: Final[Mapping[str, bool | None]] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


class Unreadable:
    """Stands for a value whose error is already reported; nothing more is said about it."""


Scalar = str | int | float | bool | Unreadable | None


@dataclass(frozen=True, eq=False)
class Node:
    """One value of the file. Lines and columns start at 1; line 0 = given by ``-o``.

    path: dotted, list entries by index (``models.0.sampler.steps``). key_line, key_column: where
    the key of this value stands, or the value itself if it has none.
    span, key_start: where value and key lie in the text, in characters; of a mapping or list where
    it begins. flow: written in braces or brackets. Only those who edit a file need these.
    """

    value: Scalar | tuple[Node, ...] | Mapping[str, Node]
    path: str
    source: str
    line: int
    column: int
    key_line: int
    key_column: int
    span: tuple[int, int] = (-1, -1)
    key_start: int = -1
    flow: bool = False

    def issue(self, message: str, *, at_key: bool = False, path: str | None = None) -> SweepIssue:
        """Return the issue `message` at this node."""
        return SweepIssue(
            file=self.source,
            line=self.key_line if at_key else self.line,
            column=self.key_column if at_key else self.column,
            field=self.path if path is None else path,
            message=message,
        )


def absent(path: str, source: str, line: int = 0, column: int = 0) -> Node:
    """Return null where nothing is given."""
    return Node(None, path, source, line, column, line, column)


class _Fatal(Exception):
    """Reading cannot go on."""

    def __init__(self, issue: SweepIssue) -> None:
        super().__init__(issue.message)
        self.issue = issue


def parse_yaml(
    text: str,
    *,
    source: str,
    issues: Issues,
    environment: Mapping[str, str] | None = None,
    path: str = "",
    placed: bool = True,
) -> Node | None:
    """Return the root node, or None where reading could not go on; errors go to `issues`.

    ``${NAME}`` and ``${NAME:-default}`` in values are filled in from `environment`. Empty text is
    null. `placed` False leaves out lines and columns, for text that stands in no file.
    """
    size = len(text.encode())
    if size > MAX_BYTES:
        message = f"a sweep file has at most {MAX_BYTES} bytes, this one has {size}"
        issues.add(SweepIssue(source, 0, 0, path, message))
        return None
    variables = os.environ if environment is None else environment
    try:
        return _Document(text, source, issues, variables, placed).read(path)
    except _Fatal as fatal:
        issues.add(fatal.issue)
    except yaml.MarkedYAMLError as error:
        issues.add(_syntax_issue(error, source, path, placed))
    except yaml.YAMLError as error:
        problem = str(error).splitlines()[0]
        issues.add(SweepIssue(source, 0, 0, path, f"not YAML: {problem}"))
    return None


def _syntax_issue(error: yaml.MarkedYAMLError, source: str, path: str, placed: bool) -> SweepIssue:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark and placed else (0, 0)
    message = f"not YAML: {error.problem or error.context}"
    if error.problem and error.context and error.context_mark and placed:
        message += f" ({error.context} that begins on line {error.context_mark.line + 1})"
    return SweepIssue(source, line, column, path, message)


class _Document:
    """One pass over the parser's events, building nodes as they come."""

    def __init__(
        self,
        text: str,
        source: str,
        issues: Issues,
        variables: Mapping[str, str],
        placed: bool,
    ) -> None:
        self.events: Iterator[yaml.Event] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.source = source
        self.placed = placed
        self.issues = issues
        self.variables = variables
        self.anchors: dict[str, Node] = {}
        self.count = 0

    def read(self, path: str) -> Node:
        next(self.events)  # start of the stream
        first = next(self.events)
        if isinstance(first, yaml.StreamEndEvent):
            return absent(path, self.source)
        root = self._value(next(self.events), path, depth=0)
        next(self.events)  # end of the document
        rest = next(self.events)
        if not isinstance(rest, yaml.StreamEndEvent):
            raise _Fatal(self._place(rest, path).issue("one file holds one document"))
        return root

    def _place(self, event: yaml.Event, path: str, key: Node | None = None) -> Node:
        """Return an empty node where `event` stands, after counting it."""
        mark = event.start_mark
        line, column = (mark.line + 1, mark.column + 1) if mark and self.placed else (0, 0)
        key_line, key_column = (key.line, key.column) if key else (line, column)
        span = (mark.index, event.end_mark.index) if mark and event.end_mark else (-1, -1)
        return Node(
            *(Unreadable(), path, self.source, line, column, key_line, key_column),
            span=span,
            key_start=key.span[0] if key else span[0],
            flow=bool(getattr(event, "flow_style", False)),
        )

    def _count(self, node: Node, depth: int) -> None:
        self.count += 1
        if self.count > MAX_NODES:
            raise _Fatal(
                node.issue(f"aliases expanded, a sweep file has at most {MAX_NODES} values")
            )
        if depth > MAX_DEPTH:
            raise _Fatal(node.issue(f"values nest at most {MAX_DEPTH} deep"))

    def _value(self, event: yaml.Event, path: str, depth: int, key: Node | None = None) -> Node:
        place = self._place(event, path, key)
        self._count(place, depth)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise _Fatal(place.issue(f"alias *{event.anchor} has no anchor before it"))
            return self._copy(self.anchors[event.anchor], place, path, depth)
        if getattr(event, "tag", None) is not None:
            raise _Fatal(place.issue("tags (!...) are not read; write the plain value"))
        node = self._content(event, place, depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def _content(self, event: yaml.Event, place: Node, depth: int) -> Node:
        if isinstance(event, yaml.MappingStartEvent):
            return replace(place, value=self._mapping(place.path, depth))
        if isinstance(event, yaml.SequenceStartEvent):
            return replace(place, value=self._sequence(place.path, depth))
        assert isinstance(event, yaml.ScalarEvent)
        return replace(place, value=self._scalar(event, place))

    def _sequence(self, path: str, depth: int) -> tuple[Node, ...]:
        nodes: list[Node] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            nodes.append(self._value(event, join(path, str(len(nodes))), depth + 1))
        return tuple(nodes)

    def _mapping(self, path: str, depth: int) -> dict[str, Node]:
        nodes: dict[str, Node] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self._place(event, path)
            name = self._key(event, key)
            if name in nodes:
                first = nodes[name].key_line
                repeat = f"key {name!r} is already given on line {first}; keep one"
                self.issues.add(key.issue(repeat, path=join(path, name)))
            inner = join(path, name)
            value = self._whole_call(next(self.events), inner)
            nodes[name] = self._value(value, inner, depth + 1, key)
        return nodes

    def _whole_call(self, event: yaml.Event, path: str) -> yaml.Event:
        """Put together what flow mappings cut at its comma: ``{a: uniform(0, 1)}``.

        YAML reads that as two entries, ``a: uniform(0`` and ``1)`` without a value.
        """
        while _is_open_call(event):
            assert isinstance(event, yaml.ScalarEvent)
            rest, nothing = next(self.events), next(self.events)
            if not isinstance(rest, yaml.ScalarEvent) or getattr(nothing, "value", None) != "":
                raise _Fatal(self._place(event, path).issue(f"{event.value!r} lacks its ')'"))
            event.value += f", {rest.value}"
            event.end_mark = rest.end_mark
        return event

    def _key(self, event: yaml.Event, place: Node) -> str:
        if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
            raise _Fatal(place.issue("keys are plain words"))
        if event.value == "<<":
            raise _Fatal(
                place.issue("merge keys (<<) are not read; use `overrides` of the model instead")
            )
        return str(event.value)

    def _scalar(self, event: yaml.ScalarEvent, place: Node) -> Scalar:
        missing = [
            match[1]
            for match in _VARIABLE.finditer(event.value)
            if match[2] is None and match[1] not in self.variables
        ]
        if missing:
            name = missing[0]
            rule = f"environment variable {name} is not set; set it or write ${{{name}:-default}}"
            self.issues.add(place.issue(rule))
            return Unreadable()
        text = _VARIABLE.sub(self._variable, event.value)
        return resolve(text) if event.implicit[0] else text

    def _variable(self, match: re.Match[str]) -> str:
        value = self.variables.get(match[1], "")
        return value or match[2] or ""

    def _copy(self, node: Node, place: Node, path: str, depth: int) -> Node:
        """Return `node` as if it stood at `path`; values keep the lines of the anchor."""
        self._count(place, depth)
        value = node.value
        if isinstance(value, tuple):
            value = tuple(
                self._copy(item, item, join(path, str(index)), depth + 1)
                for index, item in enumerate(value)
            )
        elif isinstance(value, Mapping):
            value = {
                name: self._copy(item, item, join(path, name), depth + 1)
                for name, item in value.items()
            }
        return replace(
            node,
            value=value,
            path=path,
            key_line=place.key_line,
            key_column=place.key_column,
            key_start=place.key_start,
        )


def _is_open_call(event: yaml.Event) -> bool:
    """Whether a plain scalar is the beginning of ``name(low, high)``."""
    if not isinstance(event, yaml.ScalarEvent) or event.style is not None:
        return False
    return _OPEN_CALL.fullmatch(event.value) is not None


def resolve(text: str) -> str | int | float | bool | None:
    """Return what an unquoted scalar means; ``1e-4`` is a number, ``no`` and ``12:30`` are text."""
    if text in _WORDS:
        return _WORDS[text]
    if _WHOLE.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text):
        return _float(text)
    return text


def _float(text: str) -> float:
    word = text.lower().lstrip("+-")
    if word == ".nan":
        return math.nan
    if word == ".inf":
        return -math.inf if text.startswith("-") else math.inf
    return float(text)


def join(path: str, name: str) -> str:
    """Return the dotted path of `name` inside `path`."""
    return f"{path}.{name}" if path else name
