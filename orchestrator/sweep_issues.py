"""Errors of a sweep file, collected while reading so that all are reported at once."""

from __future__ import annotations

from dataclasses import dataclass

from dipgo_core.errors import SweepFileError


@dataclass(frozen=True, order=True)
class SweepIssue:
    """One error. Lines and columns start at 1; line 0 = the whole file, or given by ``-o``."""

    file: str
    line: int
    column: int
    field: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return (
            f"{place}: {self.field}: {self.message}" if self.field else f"{place}: {self.message}"
        )


class Issues:
    """What was found so far; an issue that several models share is kept once."""

    def __init__(self) -> None:
        self._found: dict[SweepIssue, None] = {}

    def add(self, issue: SweepIssue) -> None:
        self._found[issue] = None

    def __bool__(self) -> bool:
        return bool(self._found)

    def error(self) -> SweepFileError:
        """Return one error that lists all issues in the order of the file."""
        issues = tuple(sorted(self._found))
        noun = "error" if len(issues) == 1 else "errors"
        lines = "\n".join(f"  {issue}" for issue in issues)
        return SweepFileError(f"{len(issues)} {noun} in the sweep file:\n{lines}", issues)
