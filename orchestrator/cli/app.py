"""Commands of `dipgo-sweep`: read arguments, call the orchestrator, print. Heavy imports wait."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from dipgo_core.errors import (
    ConfigError,
    DipgoError,
    ModelFilesError,
    SubNetError,
    TargetError,
    UnknownModelError,
)
from orchestrator.cli.cache_commands import cache
from orchestrator.cli.job_commands import doctor, logs, submit
from orchestrator.cli.model_commands import models
from orchestrator.cli.options import (
    Address,
    AsJson,
    Executors,
    ExitCode,
    Insecure,
    MaybeJobAddress,
    ModelName,
    Overrides,
    SweepPath,
    Wait,
    Workers,
)
from orchestrator.cli.show import print_json, say
from orchestrator.secrets import redact_logs

app = typer.Typer(
    name="dipgo-sweep",
    help="Find which computation of a diffusion model can be skipped at which denoising step, "
    "and sweep it to Pareto fronts of speed against quality.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # it would take [default: ...] for markup
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(models, name="models")
app.add_typer(cache, name="cache")

#: Errors that the user's input caused; all others end with exit code 1.
USAGE_ERRORS = (ConfigError, UnknownModelError, ModelFilesError, SubNetError, TargetError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: errors as clear text, a traceback only for our own faults."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="dipgo-sweep")
    except DipgoError as error:
        say(f"error: {error}", stderr=True)
        sys.exit(ExitCode.USAGE if isinstance(error, USAGE_ERRORS) else ExitCode.INTERNAL)
    except Exception:
        say(traceback.format_exc(), stderr=True)
        say(
            "This is a fault of dipgo-sweep, not of your input. What was finished is in the store; "
            "run the command again with --verbose, and report it with the lines above.",
            stderr=True,
        )
        sys.exit(ExitCode.INTERNAL)


def _version(wanted: bool) -> None:
    if wanted:
        from dipgo_core import __version__

        say(f"dipgo-sweep {__version__}")
        raise typer.Exit


@app.callback()
def settings(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more on stderr.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Set up logging on stderr."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    redact_logs()
    for noisy in ("urllib3", "filelock", "matplotlib", "PIL", "git", "alembic"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


@app.command()
def run(
    file: SweepPath,
    override: Overrides = None,
    executor: Executors = "ray",
    address: Address = None,
    workers: Workers = None,
    insecure: Insecure = False,
    wait: Wait = False,
) -> None:
    """Run a sweep, or go on with it: whatever the store holds already is not computed again."""
    from orchestrator.cli.running import Command, run_and_show

    _refuse_ignored(executor, address, workers)
    command = Command(
        file, override or [], executor, address, workers, insecure=insecure, wait=wait
    )
    raise typer.Exit(run_and_show(command))


@app.command()
def retry(
    file: SweepPath,
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY...]", help="Tasks, by the first characters of their keys."),
    ] = None,
    override: Overrides = None,
    executor: Executors = "ray",
    address: Address = None,
    workers: Workers = None,
    insecure: Insecure = False,
    wait: Wait = False,
) -> None:
    """Try the tasks that failed again, or those named, and run what depends on them."""
    from orchestrator.cli.running import Command, run_and_show

    _refuse_ignored(executor, address, workers)
    command = Command(
        file,
        override or [],
        executor,
        address,
        workers,
        retry=keys or [],
        insecure=insecure,
        wait=wait,
    )
    raise typer.Exit(run_and_show(command))


def _refuse_ignored(executor: str, address: str | None, workers: int | None) -> None:
    """Refuse options that another one, or the environment, would make meaningless.

    Raises:
        typer.BadParameter: names both.
    """
    if executor == "local" and (address or workers):
        given = "--address" if address else "--workers"
        raise typer.BadParameter(
            "runs one task after another in this process; leave one of the two out",
            param_hint=f"{given} with --executor local",
        )
    elsewhere = "--address" if address else "RAY_ADDRESS" if os.environ.get("RAY_ADDRESS") else ""
    if workers and elsewhere:
        raise typer.BadParameter(
            "a running cluster has as many workers as its nodes hold; leave one of the two out",
            param_hint=f"--workers with {elsewhere}",
        )


@app.command()
def stop(
    file: SweepPath,
    override: Overrides = None,
    address: MaybeJobAddress = None,
    now: Annotated[
        bool, typer.Option("--now", help="End the job at --address at once, running tasks too.")
    ] = False,
    insecure: Insecure = False,
) -> None:
    """Ask whoever runs a sweep to end: running tasks finish, no more are started."""
    if address is not None:
        from orchestrator.cli.jobs import stop_job

        stop_job(file, override or [], address, insecure, now=now)
        return
    if now:
        raise typer.BadParameter("ends a job of a cluster: give its --address", param_hint="--now")
    from orchestrator.cli.stopping import stop_and_show

    stop_and_show(file, override or [])


@app.command()
def plan(
    file: SweepPath,
    override: Overrides = None,
    as_json: AsJson = False,
    simulate: Annotated[
        bool,
        typer.Option("--simulate", help="Predict wall time and utilisation; --gpus implies it."),
    ] = False,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="Of the simulated cluster [default: this machine].")
    ] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Of a simulated node [default: 8, at most --gpus].")
    ] = None,
    cpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="Of a simulated node [default: 16 a GPU].")
    ] = None,
) -> None:
    """Show what a run would compute and cost, and what is in the store already."""
    from orchestrator.cli.planning import Asked, plan_and_show

    asked = Asked(gpus, gpus_per_node, cpus_per_node)
    plan_and_show(file, override or [], as_json=as_json, simulate=simulate, asked=asked)


@app.command()
def validate(file: SweepPath, override: Overrides = None, as_json: AsJson = False) -> None:
    """Check a sweep file whole, and the files it names: every error at once, without network."""
    from orchestrator.cli.tables import print_sweep
    from orchestrator.facts import gather_facts
    from orchestrator.preflight import remarks_on_items
    from orchestrator.sweep_file import load_sweep

    sweep = load_sweep(file, override or [])
    remarks = remarks_on_items(sweep, gather_facts(sweep, offline=True))
    if remarks:
        say("\n".join(remarks), stderr=True)
    if as_json:
        print_json(sweep.to_json())
    else:
        print_sweep(file, sweep)


@app.command()
def status(
    file: SweepPath,
    override: Overrides = None,
    as_json: AsJson = False,
    address: MaybeJobAddress = None,
    insecure: Insecure = False,
) -> None:
    """Show what is done, what is not, and what failed, from the store alone."""
    if address is not None:
        from orchestrator.cli.jobs import status_of_job

        status_of_job(file, override or [], address, insecure, as_json=as_json)
        return
    from orchestrator.cli.running import Command
    from orchestrator.cli.status import print_status, status_json
    from orchestrator.cli.sweeps import open_results

    overrides = override or []
    document = status_json(open_results(file, overrides), Command(file, overrides))
    if as_json:
        print_json(document)
    else:
        print_status(document)


@app.command()
def pareto(
    file: SweepPath,
    override: Overrides = None,
    as_json: AsJson = False,
    all_metrics: Annotated[
        bool, typer.Option("--all", help="Fronts of every quality metric, not the headline only.")
    ] = False,
) -> None:
    """Show what searched SubNets gain, and the Pareto fronts of what is finished so far."""
    from orchestrator.cli.sweeps import open_results
    from orchestrator.cli.tables import print_fronts, print_verdicts

    results = open_results(file, override or [])
    if as_json:
        print_json(results.to_json())
    else:
        print_verdicts(results.points, results.headlines)
        print_fronts(results.points, results.fronts if all_metrics else results.headline_fronts)


@app.command()
def compare(
    sides: Annotated[
        list[str],
        typer.Argument(
            metavar="[FILE] A B",
            help="Two sweep files, two SubNet files, or a sweep file and the keys of two points.",
        ),
    ],
    override: Overrides = None,
    model: ModelName = None,
    as_json: AsJson = False,
) -> None:
    """Compare two points, or two sweeps point by point: under one protocol, or not at all."""
    from orchestrator.cli.compare import compare_named, comparisons_json, print_comparisons

    found = compare_named(sides, override or [], model)
    if as_json:
        print_json(comparisons_json(found))
    else:
        print_comparisons(found)


@app.command()
def report(
    file: SweepPath,
    override: Overrides = None,
    as_json: AsJson = False,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="[default: the sweep's folder in the store]"),
    ] = None,
) -> None:
    """Write report.html, pareto.png, CSV, JSON and Markdown of what is finished so far."""
    from orchestrator.cli.sweeps import open_results, write_report_files

    paths = write_report_files(open_results(file, override or []), output)
    if as_json:
        print_json({"files": list(paths)})
    else:
        say("\n".join(paths))


@app.command()
def export(
    file: SweepPath,
    output: Annotated[Path, typer.Option(help="Where to write the SubNet.")] = Path("subnet.json"),
    override: Overrides = None,
    point: Annotated[
        str | None, typer.Option(metavar="KEY", help="Key of a point, or its first characters.")
    ] = None,
    model: ModelName = None,
    target: Annotated[
        float | None, typer.Option(metavar="R", help="The searched point of this pruned ratio.")
    ] = None,
) -> None:
    """Write the SubNet of a point: one by its key, the best of a target, or the front's knee."""
    from orchestrator.cli.exporting import choose_point
    from orchestrator.cli.sweeps import open_results
    from orchestrator.export import export_subnet

    results = open_results(file, override or [])
    chosen = choose_point(results, point=point, model=model, target=target)
    output.parent.mkdir(parents=True, exist_ok=True)
    export_subnet(chosen, results.store.records(), results.sweep).save(output)
    where = "" if chosen.target is None else f" at {chosen.target:g}"
    say(f"{chosen.model}: {chosen.name}{where}, key {chosen.key}", stderr=True)
    say(str(output))


@app.command()
def generate(
    subnet: Annotated[
        str,
        typer.Argument(
            metavar="SUBNET", help="A file that `export` wrote, or a hub id that holds one."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="A text, or a class of a class-conditional model.")],
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to write the image.")] = Path("image.png"),
    compare: Annotated[
        bool,
        typer.Option("--compare", help="The dense model's image of the same noise at the left."),
    ] = False,
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option()] = "float32",
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
) -> None:
    """Make an image with a SubNet."""
    from dipgo_core.subnet import SubNet
    from orchestrator.cli.images import generate_images, save_image, side_by_side

    loaded = SubNet.from_pretrained(subnet)
    pruned, dense = generate_images(
        loaded, prompt, seed, dtype=dtype, device=device, compare=compare
    )
    image = pruned.image if dense is None else side_by_side(dense.image, pruned.image)
    save_image(image, output)
    if dense is not None:
        say(f"dense {dense.seconds:.2f} s, SubNet {pruned.seconds:.2f} s (one call)", stderr=True)
    say(str(output))


@app.command()
def bench(
    subnet: Annotated[
        str, typer.Option(help="A file that `export` wrote, or a hub id that holds one.")
    ],
    model: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="Where its model lies [default: the SubNet's id]."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="Of a model that is one file (docs/hub.md)."),
    ] = None,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option()] = "float32",
    batch_size: Annotated[int, typer.Option(min=1, help="Images a call.")] = 1,
    resolution: Annotated[
        int | None, typer.Option(min=8, metavar="PIXELS", help="[default: the model's own]")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="A text, or the number of a class.")] = None,
    min_runs: Annotated[int, typer.Option(min=2, help="Pairs that count, at least.")] = 10,
    min_seconds: Annotated[float, typer.Option(min=0, help="Time they take, at least.")] = 5.0,
    max_warmup: Annotated[int, typer.Option(min=0, help="Pairs before, at most.")] = 20,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads [default: PyTorch's].")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks, of the dense model too.")
    ] = False,
    fuse: Annotated[
        bool, typer.Option("--fuse", help="One step for each run of skipped calls (DDIM, Euler).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure a SubNet against its dense model on this machine, side by side; needs no sweep."""
    from orchestrator.cli.bench import Asked, bench_json, print_bench, run_bench

    asked = Asked(
        subnet=subnet,
        model=model,
        base=base,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        resolution=resolution,
        prompt=prompt,
        min_runs=min_runs,
        min_seconds=min_seconds,
        max_warmup=max_warmup,
        threads=threads,
        compile=compile,
        fuse=fuse,
    )
    found = run_bench(asked)
    if as_json:
        print_json(bench_json(asked, found))
    else:
        print_bench(asked, found)


@app.command()
def prefetch(
    file: SweepPath,
    override: Overrides = None,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List, and fetch nothing.")] = False,
) -> None:
    """List what a sweep needs from the model hub, and fetch what is not here yet, once."""
    from orchestrator.cli.prefetch import prefetch_and_show

    raise typer.Exit(prefetch_and_show(file, override or [], as_json=as_json, dry_run=dry_run))


@app.command()
def pin(
    file: SweepPath,
    as_json: AsJson = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List, and write nothing.")] = False,
) -> None:
    """Write the commit of every revision on the hub into the sweep file; nothing else changes."""
    from orchestrator.cli.pin import pin_and_show

    pin_and_show(file, as_json=as_json, dry_run=dry_run)


@app.command()
def sync(file: SweepPath, override: Overrides = None) -> None:
    """Send the tracking server what it lacks of a sweep, after it was away; computes nothing."""
    from orchestrator.cli.syncing import sync_and_show

    raise typer.Exit(sync_and_show(file, override or []))


@app.command()
def ui(
    file: SweepPath,
    override: Overrides = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
) -> None:
    """Open MLflow on the sweep's runs: print the address and serve until Ctrl-C."""
    from orchestrator.sweep_file import load_sweep
    from orchestrator.tracking import tracking_uri

    uri = tracking_uri(load_sweep(file, override or []).tracking.uri)
    if uri.startswith(("http://", "https://")):
        say(uri)
        return
    say(f"http://127.0.0.1:{port}")
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_BACKEND_STORE_URI": uri}  # arguments are for all to read
    try:
        raise typer.Exit(subprocess.call(command, env=environment))
    except KeyboardInterrupt:
        raise typer.Exit from None


for each in (submit, logs, doctor):
    app.command()(each)
