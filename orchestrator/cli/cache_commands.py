"""Commands under `dipgo-sweep cache`: what a store holds, what may go, whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import AsJson, Overrides

cache = typer.Typer(help="What a store holds, what of it may go, and whether it is whole.")

File = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="A sweep file, whose storage it is."),
]
Storage = Annotated[
    str | None,
    typer.Option(metavar="URL", help="The storage, without a sweep file [default: ./.dipgo]."),
]


@cache.command("ls")
def list_holdings(
    file: File = None,
    override: Overrides = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """List what the store holds, by kind and sweep, with sizes and ages."""
    from orchestrator.cli.cache import opened, show_holdings

    show_holdings(opened(file, override or [], storage), as_json=as_json)


@cache.command("gc")
def collect(
    file: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="Sweep files of one storage.")
    ] = None,
    override: Overrides = None,
    storage: Storage = None,
    shards: Annotated[
        bool,
        typer.Option(
            "--shards", help="Also scores of images whose evaluation is done: more images, all new."
        ),
    ] = False,
    unneeded: Annotated[
        bool, typer.Option("--unneeded", help="Also all records that no FILE needs.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what nobody needs: no record, and nothing a result rests on, unless asked for."""
    from orchestrator.cli.cache import collect_and_show

    collect_and_show(
        file or [],
        override or [],
        storage,
        shards=shards,
        unneeded=unneeded,
        dry_run=dry_run,
        as_json=as_json,
    )


@cache.command("verify")
def verify(
    file: File = None,
    override: Overrides = None,
    storage: Storage = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Set aside what is damaged: the next run remakes it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Read everything the store holds, and tell what is not what was written."""
    from orchestrator.cli.cache import opened, verify_and_show

    verify_and_show(opened(file, override or [], storage), repair=repair, as_json=as_json)
