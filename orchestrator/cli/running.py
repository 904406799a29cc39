"""`run`: the executor asked for, progress while it works, then results and what to do next."""

from __future__ import annotations

import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dipgo_core.families import find_family
from orchestrator.background import BackgroundTracker
from orchestrator.cli.options import ExitCode
from orchestrator.cli.progress import Display, open_display
from orchestrator.cli.show import say
from orchestrator.cli.stopping import drained_by_sigterm
from orchestrator.cli.tables import print_fronts, print_verdicts
from orchestrator.driver import run_sweep
from orchestrator.executors.base import Executor
from orchestrator.headlines import Headline, headlines
from orchestrator.publish import REPORT, Publisher
from orchestrator.records import Task
from orchestrator.store import open_store
from orchestrator.sweep_file import SweepFile, load_sweep
from orchestrator.sweep_tasks import Event, RunResult
from orchestrator.tracking import MlflowTracker, tracking_uri

#: Failures told at the end; `status` lists all.
SHOWN_FAILURES = 5


@dataclass(frozen=True)
class Command:
    """What the user typed, to be told again with another verb."""

    file: Path
    overrides: Sequence[str]
    executor: str = "ray"
    address: str | None = None
    workers: int | None = None
    retry: Sequence[str] | None = None  # as `run_sweep` takes it
    insecure: bool = False
    wait: bool = False  # while another process runs the sweep

    def again(self) -> str:
        """Return the command that goes on with this run."""
        options = ["--executor", self.executor] if self.executor != "ray" else []
        options += ["--address", self.address] if self.address else []
        options += ["--workers", str(self.workers)] if self.workers else []
        options += ["--insecure"] if self.insecure else []
        options += ["--wait"] if self.wait else []
        return self.line("run", *options)

    def line(self, verb: str, *options: str) -> str:
        """Return another command about the same sweep, quoted for a shell."""
        overrides = [word for override in self.overrides for word in ("-o", override)]
        return shlex.join(["dipgo-sweep", verb, str(self.file), *overrides, *options])


def run_and_show(command: Command) -> ExitCode:
    """Run a sweep with progress on stderr, print its results, and return the exit code.

    Raises:
        DipgoError: the sweep file has errors, or the store or cluster cannot be used.
    """
    sweep = load_sweep(command.file, command.overrides)
    store = open_store(sweep.storage)
    tracker = MlflowTracker(sweep.tracking.experiment, sweep.tracking.uri)
    publisher = Publisher(sweep, store, BackgroundTracker(tracker))
    executor = make_executor(command)
    logging.getLogger("orchestrator.sweep_tasks").setLevel(logging.ERROR)  # the display tells them
    watcher = None
    try:
        with open_display() as display, drained_by_sigterm() as stop:
            watcher = Watcher(display)
            result = run_sweep(
                sweep,
                store,
                executor,
                publisher,
                watcher,
                retry=command.retry,
                stop=stop,
                wait_s=math.inf if command.wait else 0.0,
            )
    except KeyboardInterrupt:
        ran = watcher is not None and watcher.began
        when = "; finished tasks are kept" if ran else " before anything ran"
        say(f"interrupted{when}; to go on: {command.again()}", stderr=True)
        return ExitCode.INTERRUPTED
    if result.unshown:
        ways = f"{command.line('report')}; {command.line('sync')}"
        say(f"interrupted while results were written and sent; to do that: {ways}", stderr=True)
    else:
        _print_results(command, publisher)
    _print_ending(command, result)
    return exit_code(result)


def make_executor(command: Command) -> Executor:
    """Return the executor asked for; ray is imported only if it is Ray Tune."""
    if command.executor == "local":
        from orchestrator.cli.quiet import silence_loading
        from orchestrator.executors.in_process import InProcessExecutor

        silence_loading()
        return InProcessExecutor()
    from orchestrator.executors.ray_tune.run import RayTuneExecutor

    return RayTuneExecutor(command.address, command.workers, insecure=command.insecure)


class Watcher:
    """Passes the driver's events on to a display. began: whether there were any."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self.began = False

    def __call__(self, event: Event) -> None:
        self.began = True
        self._display.totals(event.done, event.total)
        if event.task is not None:
            self._pass_on(event, event.task)

    def _pass_on(self, event: Event, task: Task) -> None:
        if event.kind == "started":
            self._display.started(task.key, task.label)
        elif event.kind == "progress":
            self._display.progress(task.key, event.report)
        elif event.kind == "again":
            self._display.again(task.key, task.label, event.error or "")
        else:
            self._display.ended(task.key, task.label, event.error)


def exit_code(result: RunResult) -> ExitCode:
    """Return what the contract says about how a run ended; whoever raises budgets looks for theirs.

    A target that no SubNet reaches is a finding, not a failure.
    """
    if result.interrupted:
        return ExitCode.INTERRUPTED
    if result.budget_reached and result.skipped:
        return ExitCode.BUDGET
    if result.failed:
        succeeded = result.done or result.cached
        return ExitCode.SOME_FAILED if succeeded else ExitCode.ALL_FAILED
    return ExitCode.DONE


def _print_results(command: Command, shown: Publisher) -> None:
    """Print fronts, verdicts, where things lie and what to do next."""
    quality = shown.sweep.objective.quality
    lines = headlines(shown.points, quality)
    print_verdicts(shown.points, lines)
    print_fronts(shown.points, [each for each in shown.fronts if each.objectives[1] == quality])
    _print_files(shown)
    _print_next(command, shown.sweep, lines[-1] if lines else None)


def _print_files(shown: Publisher) -> None:
    name, store = shown.sweep.name, shown.store
    written = [store.sweep_file_place(name, file) for file in store.sweep_files(name, REPORT)]
    if written:
        say("report:")
        say("\n".join(f"  {place}" for place in written))
    say(f"tracking: {tracking_uri(shown.sweep.tracking.uri)}")


def _print_next(command: Command, sweep: SweepFile, example: Headline | None) -> None:
    """Print commands to try; `example`: a model and a target that have a finished SubNet."""
    lines = [command.line("pareto", "--all")]
    if example is not None:
        options = ["--model", example.model, "--target", f"{example.target:g}"]
        lines.append(command.line("export", *options, "--output", "subnet.json"))
        prompt = shlex.quote(example_prompt(sweep, example.model))
        lines.append(f"dipgo-sweep generate subnet.json --prompt {prompt} --compare")
    lines.append(command.line("ui"))
    say("next:")
    say("\n".join(f"  {line}" for line in lines))


def example_prompt(sweep: SweepFile, model: str) -> str:
    """Return a prompt, or the number of a class for a class-conditional model."""
    family = next(each.family for each in sweep.models if each.name == model)
    by_text = find_family(family).conditioning == "prompt"
    return "a red sneaker on a navy background" if by_text else "0"


def _print_ending(command: Command, result: RunResult) -> None:
    """Tell on stderr how a run ended, and how to go on."""
    counts = f"{len(result.done)} tasks done, {len(result.cached)} were in the store"
    say(f"{counts}, {len(result.failed)} failed, {len(result.skipped)} not run", stderr=True)
    for line in _unreached(result):
        say(line, stderr=True)
    for error in list(result.failed.values())[:SHOWN_FAILURES]:
        say(f"failed: {error}", stderr=True)
    if result.failed:
        say(f"all failures, with traces: {command.line('status')}", stderr=True)
        say(f"to try them again: {command.line('retry')}", stderr=True)
    if result.budget_reached and result.skipped:
        say(f"{result.stopped}; raise it and go on: {command.again()}", stderr=True)
    elif result.interrupted:
        why = result.stopped or "interrupted"
        say(f"{why}, finished tasks are kept; to go on: {command.again()}", stderr=True)


def _unreached(result: RunResult) -> list[str]:
    """Return why points are missing though nothing failed, the first ones."""
    told = [
        f"no such point: {p.model}: {p.label}: {p.error}" for p in result.plan.points if p.error
    ]
    more = len(told) - SHOWN_FAILURES
    return [*told[:SHOWN_FAILURES], *([f"and {more} more such points"] if more > 0 else [])]
