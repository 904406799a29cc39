"""Arguments and options that several commands share, and the exit codes of the command line."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal

import typer


class ExitCode(IntEnum):
    """What a shell script may rely on (130 = interrupted, state saved)."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    SOME_FAILED = 3
    ALL_FAILED = 4
    BUDGET = 5
    INTERRUPTED = 130


SweepPath = Annotated[
    Path, typer.Argument(metavar="FILE", help="The sweep file, such as sweeps/quickstart.yaml.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--override",
        metavar="KEY=VALUE",
        help="Change one setting of the file, such as storage=/mnt/x or targets=[0.5]; repeatable.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
ModelName = Annotated[
    str | None, typer.Option("--model", metavar="NAME", help="Only this model of the sweep.")
]
Executors = Annotated[
    Literal["ray", "local"],
    typer.Option(help="ray: Ray Tune; local: one task after another in this process."),
]
Address = Annotated[
    str | None,
    typer.Option(help="Ray cluster to use [default: RAY_ADDRESS, else this machine]."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Tasks at a time on this machine [default: CPUs].")
]
Wait = Annotated[bool, typer.Option("--wait", help="Wait while another process runs this sweep.")]
JobAddress = Annotated[
    str,
    typer.Option("--address", metavar="http://HEAD:8265", help="The cluster's job server."),
]
MaybeJobAddress = Annotated[
    str | None,
    typer.Option(
        "--address", metavar="http://HEAD:8265", help="Where `submit` sent it [default: not sent]."
    ),
]
Insecure = Annotated[
    bool,
    typer.Option(
        "--insecure", help="Use a cluster that other machines reach and that asks for no token."
    ),
]
