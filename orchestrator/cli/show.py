"""Tables and JSON on stdout: what the commands print."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from orchestrator.secrets import redact, redacted

#: Wide enough for a row of figures with intervals where there is no terminal to ask.
PIPE_WIDTH = 160


def console(*, stderr: bool = False) -> Console:
    """Return a console for data (stdout) or logs (stderr); NO_COLOR is honoured by rich."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=not stream.isatty())


def say(text: str = "", *, stderr: bool = False) -> None:
    """Print a line, as it is but for secrets, in one write: no thread that logs cuts it in two."""
    stream = sys.stderr if stderr else sys.stdout
    stream.write(f"{redact(text)}\n")
    if stderr:
        stream.flush()


def print_json(document: Any) -> None:
    """Print one JSON document without secrets; NaN is refused, for it is not JSON."""
    plain = json.loads(json.dumps(document, allow_nan=False, default=_plain))
    print(json.dumps(redacted(plain), indent=1))


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def megabytes(count: float) -> str:
    """Return bytes in MB (10^6), to three digits; whole from a hundred on."""
    return f"{count / 1e6:.0f}" if count >= 1e8 else f"{count / 1e6:.3g}"


def print_wrapped(name: str, text: str) -> None:
    """Print one named list, its further lines indented."""
    shown = Table.grid(padding=(0, 1))
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")
    shown.add_row(f"{name}:", redact(text))
    console().print(shown)


def print_table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    right: Sequence[str] = (),
    compact: bool = False,
) -> None:
    """Print a table; the columns named in `right` hold numbers. compact: little space between."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=compact,
        pad_edge=not compact,
    )
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(redact(cell) for cell in row))
    console().print(table)
