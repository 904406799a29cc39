"""Commands for sweeps on a cluster: `submit`, `logs`, and `doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from orchestrator.cli.options import AsJson, Insecure, JobAddress, Overrides, SweepPath
from orchestrator.cli.show import print_json, say


def submit(
    file: SweepPath, address: JobAddress, override: Overrides = None, insecure: Insecure = False
) -> None:
    """Send a sweep to a Ray cluster, with the local files it names; the cluster runs it."""
    from orchestrator.cli.jobs import submit_and_show

    submit_and_show(file, override or [], address, insecure=insecure)


def logs(
    file: SweepPath,
    address: JobAddress,
    override: Overrides = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Until it ends.")] = False,
    insecure: Insecure = False,
) -> None:
    """Print what the driver of a sweep that was sent to a cluster prints."""
    from orchestrator.cli.jobs import logs_of_job

    logs_of_job(file, override or [], address, insecure, follow=follow)


def doctor(as_json: AsJson = False) -> None:
    """Show the versions of all that decides results; `submit` compares them with a cluster's."""
    from orchestrator.versions import installed_versions

    found = installed_versions()
    if as_json:
        print_json(found)
    else:
        say("\n".join(f"{name} {version}" for name, version in found.items()))
