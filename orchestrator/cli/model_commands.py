"""Commands under `dipgo-sweep models`: the list of known models, and the graph of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dipgo_core.config import Granularity
from orchestrator.cli.options import AsJson
from orchestrator.cli.show import print_json, say

models = typer.Typer(invoke_without_command=True)


@models.callback()
def known(context: typer.Context, as_json: AsJson = False) -> None:
    """List families and known models; `models show ID` draws the block graph of one."""
    if context.invoked_subcommand is not None:
        return
    from orchestrator.cli.models import models_json, print_models

    if as_json:
        print_json(models_json())
    else:
        print_models()


@models.command()
def show(
    model: Annotated[
        str, typer.Argument(metavar="ID", help="A known model, a local folder, or a hub id.")
    ],
    granularity: Annotated[Granularity, typer.Option(help="What is gated.")] = "block",
    resolution: Annotated[
        int | None, typer.Option(min=8, metavar="PIXELS", help="[default: the model's own]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write a drawing instead.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Draw the block graph of a model from its configs; no weights are read if it has a family."""
    from dipgo_core.outline import outline_of
    from orchestrator.cli.model_graph import graph_json, print_graph
    from orchestrator.cli.quiet import silence_loading

    silence_loading()
    outline = outline_of(model, granularity=granularity, resolution=resolution)
    if output is not None:
        from orchestrator.cli.graph_svg import write_svg

        write_svg(outline, output)
        say(str(output))
    elif as_json:
        print_json(graph_json(outline))
    else:
        print_graph(outline)
