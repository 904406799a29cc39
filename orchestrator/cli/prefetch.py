"""`prefetch`: a table of what a sweep needs from outside, then the fetching of what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from orchestrator.cli.options import ExitCode
from orchestrator.cli.show import print_json, print_table, say
from orchestrator.hub_needs import place_of
from orchestrator.prefetch import Stock, Survey, fetch, survey
from orchestrator.sweep_file import load_sweep

_COLUMNS = ("what", "repository", "commit", "files", "size", "to fetch", "licence", "access")
_UNITS = ("B", "kB", "MB", "GB", "TB")


def prefetch_and_show(
    file: Path, overrides: Sequence[str], *, as_json: bool, dry_run: bool
) -> ExitCode:
    """List and fetch; 2 where something cannot be fetched, or has to be put in place by hand.

    Raises:
        DipgoError: the sweep file has errors, or a download failed.
    """
    found = survey(load_sweep(file, overrides))
    if not as_json:
        _print_survey(found)
    if not found.problems and not dry_run:
        _fetch(found)
    if as_json:
        print_json({**found.to_json(), "fetched": not (found.problems or dry_run)})
    by_hand = [f"{place_of(f.users)}: {f.problem}" for f in found.published if f.problem]
    for line in (*found.problems, *by_hand):
        say(f"error: {line}", stderr=True)
    if found.problems:
        say("nothing was fetched", stderr=True)
    return ExitCode.USAGE if found.problems or by_hand else ExitCode.DONE


def _fetch(found: Survey) -> None:
    for stock, folder in fetch(found):
        if stock.bytes_to_fetch:
            size = size_text(stock.bytes_to_fetch)
            say(f"fetched {size} of {stock.need.id} into {folder}", stderr=True)


def _print_survey(found: Survey) -> None:
    if found.stocks:
        rows = [_row(stock) for stock in found.stocks]
        print_table("From the hub", _COLUMNS, rows, right=("files", "size", "to fetch"))
    for file in found.published:
        say(f"{file.scorer}: {file.path or 'missing'}")
    if not found.stocks and not found.published:
        say("the sweep needs nothing from outside")
    say(
        f"{size_text(found.bytes)} in all, {size_text(found.bytes_to_fetch)} to fetch into "
        f"{found.cache}, {size_text(found.free_bytes)} free there"
    )


def _row(stock: Stock) -> tuple[str, ...]:
    need = stock.need
    by_library = need.kind == "prompts" and need.file is None
    return (
        need.kind if need.role is None else f"{need.role} scorer",
        need.id,
        stock.commit[:12] + ("" if need.pinned else f" ({need.revision or 'main'} now)"),
        "by `run`" if by_library else str(len(stock.files)),
        "" if by_library else size_text(stock.bytes),
        "" if by_library else size_text(stock.bytes_to_fetch),
        stock.licence or ("not asked" if stock.gated is None else "none told"),
        _access(stock),
    )


def _access(stock: Stock) -> str:
    if stock.gated is None:
        return "not asked"
    if not stock.gated:
        return "open"
    return "gated, HF_TOKEN has access" if stock.readable else "gated, needs HF_TOKEN"


def size_text(size: int) -> str:
    """Return a number of bytes with its decimal unit, three digits at least: 95.6 MB."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1
    return f"{value:.{digits}f} {_UNITS[unit]}"
