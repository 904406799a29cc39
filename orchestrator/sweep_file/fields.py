"""Readers of single values and of mappings: each returns a checked value or reports an issue.

A reader takes a node and the issues found so far and returns its value, or None after reporting.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, TypeVar

from dipgo_core.errors import nearest
from orchestrator.sweep_issues import Issues
from orchestrator.yaml_source import Node, Unreadable, absent, join

T = TypeVar("T")
Name = TypeVar("Name", bound=str)
Reader = Callable[[Node, Issues], T | None]

MAX_ENTRIES: Final = 1000
MAX_SEED: Final = 2**32 - 1


def shown(node: Node) -> str:
    """Return the value of `node` as an error message shows it."""
    value = node.value
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, tuple):
        return f"a list of {len(value)}"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    return str(value)


def reject(node: Node, issues: Issues, rule: str, hint: str = "") -> None:
    """Report ``rule, got value`` unless the value could not be read in the first place."""
    if not isinstance(node.value, Unreadable):
        issues.add(node.issue(f"{rule}, got {shown(node)}{'.' if hint else ''}{hint}"))


def text(*, valid: Callable[[str], str | None] | None = None) -> Reader[str]:
    """Read a non-empty text; `valid` returns the rule that the text breaks, or None."""

    def read(node: Node, issues: Issues) -> str | None:
        if not isinstance(node.value, str) or not node.value:
            quote = isinstance(node.value, (int, float))
            reject(node, issues, f"must be text{' (put it in quotes)' if quote else ''}")
            return None
        rule = valid(node.value) if valid else None
        if rule is not None:
            issues.add(node.issue(rule))
            return None
        return node.value

    return read


def whole(at_least: int = 0, at_most: int = 1_000_000_000) -> Reader[int]:
    """Read a whole number; true and false are none."""

    def read(node: Node, issues: Issues) -> int | None:
        value = node.value
        if isinstance(value, int) and not isinstance(value, bool) and at_least <= value <= at_most:
            return value
        many = isinstance(value, int) and value > at_most
        bound = f"at most {at_most}" if many else f"at least {at_least}"
        reject(node, issues, f"must be a whole number, {bound}")
        return None

    return read


def number(
    at_least: float = -math.inf,
    *,
    above: float = -math.inf,
    below: float = math.inf,
) -> Reader[float]:
    """Read a finite number in the given range; whole numbers are numbers, true and false not."""
    bounds = [(at_least, "at least"), (above, "above"), (below, "below")]
    rule = " and ".join(f"{word} {bound:g}" for bound, word in bounds if math.isfinite(bound))

    def read(node: Node, issues: Issues) -> float | None:
        value = node.value
        figure = math.nan
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            figure = float(value)
        if math.isfinite(figure) and figure >= at_least and above < figure < below:
            return figure
        reject(node, issues, f"must be a number{', ' if rule else ''}{rule}")
        return None

    return read


def boolean(node: Node, issues: Issues) -> bool | None:
    """Read true or false."""
    if isinstance(node.value, bool):
        return node.value
    reject(node, issues, "must be true or false")
    return None


def choice(valid: Sequence[Name]) -> Reader[Name]:
    """Read one of the names in `valid`."""
    by_name: Mapping[str, Name] = {name: name for name in valid}

    def read(node: Node, issues: Issues) -> Name | None:
        if isinstance(node.value, str) and node.value in by_name:
            return by_name[node.value]
        hint = nearest(node.value, tuple(valid)) if isinstance(node.value, str) else ""
        reject(node, issues, f"must be one of {', '.join(valid)}", hint)
        return None

    return read


def many(reader: Reader[T], *, at_least: int = 1) -> Reader[tuple[T, ...]]:
    """Read a list of different values, `MAX_ENTRIES` at most."""

    def read(node: Node, issues: Issues) -> tuple[T, ...] | None:
        if not isinstance(node.value, tuple):
            reject(node, issues, "must be a list")
            return None
        if not at_least <= len(node.value) <= MAX_ENTRIES:
            rule = f"must list {at_least} to {MAX_ENTRIES} values, got {len(node.value)}"
            issues.add(node.issue(rule))
            return None
        values: dict[str, T] = {}
        for item in node.value:
            value = reader(item, issues)
            if value is not None and repr(value) in values:
                issues.add(item.issue(f"is listed twice: {shown(item)}"))
            elif value is not None:
                values[repr(value)] = value
        return tuple(values.values())

    return read


def falling(reader: Reader[T]) -> Reader[tuple[T, ...]]:
    """Read a list of values, each lower than the one before."""
    several = many(reader)

    def read(node: Node, issues: Issues) -> tuple[T, ...] | None:
        values: Any = several(node, issues)
        if values is None or not isinstance(node.value, tuple) or len(values) < len(node.value):
            return None
        for item, value, earlier in zip(node.value[1:], values[1:], values, strict=False):
            if value > earlier:
                issues.add(
                    item.issue(f"must be below the entry before ({earlier:g}), got {value:g}")
                )
                return None
        return tuple(values)

    return read


def axis(reader: Reader[T]) -> Reader[tuple[T, ...]]:
    """Read a list as the values of an axis of the grid, anything else as its only value."""
    several = many(reader)

    def read(node: Node, issues: Issues) -> tuple[T, ...] | None:
        if isinstance(node.value, tuple):
            return several(node, issues)
        value = reader(node, issues)
        return None if value is None else (value,)

    return read


class Fields:
    """A mapping being read by name; on leaving the `with` block unknown keys are reported."""

    def __init__(self, node: Node, issues: Issues) -> None:
        self.node = node
        self.issues = issues
        self._asked: list[str] = []
        self._known: Mapping[str, Node] = {}
        if isinstance(node.value, Mapping):
            self._known = node.value
        elif node.value is not None:
            reject(node, issues, "must be a mapping (key: value)")

    def __enter__(self) -> Fields:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, node in self._known.items():
            if name not in self._asked:
                hint = nearest(name, self._asked)
                rule = f"unknown key; valid are {', '.join(self._asked)}{'.' if hint else ''}{hint}"
                self.issues.add(node.issue(rule, at_key=True))

    def child(self, name: str) -> Node | None:
        """Return the node of `name`, if it is given."""
        self._asked.append(name)
        return self._known.get(name)

    def place(self, name: str) -> Node:
        """Return where an issue about `name` belongs: its value, or this mapping."""
        return self._known.get(name, self.node)

    def section(self, name: str) -> Node:
        """Return the node of `name`, or null at this mapping's place."""
        child = self.child(name)
        here = self.node
        if child is None:
            return absent(join(here.path, name), here.source, here.line, here.column)
        return child

    def get(self, name: str, reader: Reader[T], default: T) -> T:
        """Return the value of `name`, or `default` where it is absent or wrong."""
        node = self.child(name)
        value = None if node is None else reader(node, self.issues)
        return default if value is None else value

    def maybe(self, name: str, reader: Reader[T]) -> T | None:
        """Return the value of `name`, or None where it is absent, null or wrong."""
        node = self.child(name)
        return None if node is None or node.value is None else reader(node, self.issues)

    def need(self, name: str, reader: Reader[T], stand_in: T, *, hint: str = "") -> T:
        """Return the value of `name`; its absence is an issue and gives `stand_in`."""
        self.demand(name, hint=hint)
        return self.get(name, reader, stand_in)

    def demand(self, name: str, *, hint: str = "") -> None:
        """Report `name` as missing, unless the mapping itself could not be read."""
        readable = isinstance(self.node.value, Mapping) or self.node.value is None
        if readable and name not in self._known:
            rule = f"is missing{'; ' if hint else ''}{hint}"
            self.issues.add(self.node.issue(rule, path=join(self.node.path, name)))
