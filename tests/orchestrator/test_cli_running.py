"""`run` without a model: counting tasks, progress lines, exit codes, the command to go on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from orchestrator.cli import progress, running
from orchestrator.cli.options import ExitCode
from orchestrator.cli.progress import LineDisplay, LiveDisplay, detail, open_display
from orchestrator.cli.running import (
    Command,
    Watcher,
    _print_ending,
    exit_code,
    run_and_show,
)
from orchestrator.planned import Plan, PlannedTask
from orchestrator.records import Task
from orchestrator.sweep_tasks import Event, RunResult

TASK = Task(kind="search", inputs={"model": "x"}, label="tiny: search")
COMMAND = Command(Path("x.yaml"), [], "local")
OTHER = Task(kind="evaluate", inputs={"model": "x"}, label="tiny: evaluate")


def plan_of(*tasks: Task, cached: tuple[Task, ...] = ()) -> Plan:
    planned = tuple(
        PlannedTask(
            key=task.key,
            kind=task.kind,
            model="tiny",
            label=task.label,
            needs=(),
            state="cached" if task in cached else "ready",
            task=task,
        )
        for task in tasks
    )
    return Plan(models=("tiny",), tasks=planned, points=())


def result(**fields: Any) -> RunResult:
    return RunResult(plan=plan_of(TASK), **fields)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"done": ("a",)}, ExitCode.DONE),
        ({"cached": ("a",)}, ExitCode.DONE),
        ({"done": ("a",), "failed": {"b": "no"}}, ExitCode.SOME_FAILED),
        ({"cached": ("a",), "failed": {"b": "no"}}, ExitCode.SOME_FAILED),
        ({"failed": {"b": "no"}, "skipped": ("c",)}, ExitCode.ALL_FAILED),
        ({"done": ("a",), "skipped": ("c",), "budget_reached": True}, ExitCode.BUDGET),
        ({"done": ("a",), "budget_reached": True}, ExitCode.DONE),
        (
            {"done": "a", "failed": {"b": "no"}, "skipped": "c", "budget_reached": True},
            ExitCode.BUDGET,
        ),
        ({"failed": {"b": "no"}, "interrupted": True}, ExitCode.INTERRUPTED),
    ],
)
def test_exit_code_is_that_of_the_contract(fields: dict[str, Any], code: ExitCode) -> None:
    assert exit_code(result(**fields)) == code


def test_target_that_no_subnet_reaches_is_told_and_no_failure(
    capsys: pytest.CaptureFixture[str],
) -> None:
    point = SimpleNamespace(model="tiny", label="dipgo at 0.9", error="at most 0.8 can go")
    ended = RunResult(plan=replace(plan_of(TASK), points=cast(Any, (point,))), done=("a",))
    _print_ending(COMMAND, ended)
    assert exit_code(ended) == ExitCode.DONE
    assert "no such point: tiny: dipgo at 0.9: at most 0.8 can go" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("began", "words"), [(True, "finished tasks are kept"), (False, "before anything ran")]
)
def test_interrupted_run_says_whether_anything_ran(
    began: bool,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def interrupted(*given: Any, **_: Any) -> RunResult:
        if began:
            given[4](Event(kind="planned", done=0, total=1))
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "run_sweep", interrupted)
    file = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"
    command = replace(COMMAND, file=file, overrides=[f"storage={tmp_path}"])
    assert run_and_show(command) == ExitCode.INTERRUPTED
    assert words in capsys.readouterr().err


def test_run_interrupted_while_showing_says_how_to_show(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    ended = result(done=("a",), interrupted=True, unshown=True)
    monkeypatch.setattr(running, "run_sweep", lambda *_, **__: ended)
    file = Path(__file__).parents[2] / "sweeps" / "quickstart.yaml"
    command = replace(COMMAND, file=file, overrides=[f"storage={tmp_path}"])
    assert run_and_show(command) == ExitCode.INTERRUPTED
    told = capsys.readouterr().err
    assert "dipgo-sweep report" in told and "1 tasks done" in told


def test_command_to_go_on_is_what_was_typed_quoted() -> None:
    command = Command(Path("my sweep.yaml"), ["targets=[0.5, 0.7]"], "local", None, None)
    assert command.again() == (
        "dipgo-sweep run 'my sweep.yaml' -o 'targets=[0.5, 0.7]' --executor local"
    )


def test_command_to_go_on_keeps_cluster_and_workers() -> None:
    again = Command(Path("x.yaml"), [], "ray", "ray://head:10001", 3).again()
    assert again == "dipgo-sweep run x.yaml --address ray://head:10001 --workers 3"
    assert Command(Path("x.yaml"), [], wait=True).again() == "dipgo-sweep run x.yaml --wait"


class RecordingDisplay:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __enter__(self) -> RecordingDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def totals(self, done: int, total: int) -> None:
        self.calls.append(("totals", done, total))

    def started(self, key: str, label: str) -> None:
        self.calls.append(("started", label))

    def progress(self, key: str, report: Any) -> None:
        self.calls.append(("progress", dict(report)))

    def ended(self, key: str, label: str, error: str | None) -> None:
        self.calls.append(("ended", label, error))

    def again(self, key: str, label: str, error: str) -> None:
        self.calls.append(("again", label, error))


def test_watcher_passes_counts_and_ends_on() -> None:
    display = RecordingDisplay()
    watch = Watcher(display)
    watch(Event(kind="planned", done=1, total=2))
    watch(Event(kind="started", done=1, total=2, task=TASK))
    watch(Event(kind="done", done=2, total=2, task=TASK))
    totals = [call for call in display.calls if call[0] == "totals"]
    assert totals == [("totals", 1, 2), ("totals", 1, 2), ("totals", 2, 2)]
    assert display.calls[-1] == ("ended", "tiny: search", None)


@pytest.mark.parametrize(("kind", "called"), [("failed", "ended"), ("again", "again")])
def test_watcher_tells_failures_apart_from_new_attempts(kind: Any, called: str) -> None:
    display = RecordingDisplay()
    Watcher(display)(Event(kind=kind, done=0, total=1, task=TASK, error="no"))
    assert display.calls == [("totals", 0, 1), (called, "tiny: search", "no")]


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (
            {"search_step": 3, "num_steps": 60, "loss": 0.12345, "compute_ratio": 0.5},
            "step 3/60, loss 0.123, compute 0.50",
        ),
        ({"images": 50, "of": 200}, "images 50/200"),
        ({"pairs": 4}, "pairs 4"),
    ],
)
def test_detail_words_a_report(report: dict[str, Any], text: str) -> None:
    assert detail(report) == text


def test_lines_go_to_stderr_with_the_first_line_of_an_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with LineDisplay() as display:
        display.totals(1, 4)
        display.started("k", "tiny: search")
        display.ended("k", "tiny: search", "SearchError: loss is nan\nat step 3")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "[1/4] tasks are in the store" in captured.err
    assert captured.err.endswith("[1/4] failed tiny: search: SearchError: loss is nan\n")


def test_lines_of_one_task_keep_their_distance(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.0, 1.0, 20.0, 20.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    display = LineDisplay()
    display.started("k", "tiny: evaluate")
    display.progress("k", {"images": 1, "of": 9})  # at 1 s: too soon
    display.progress("k", {"images": 9, "of": 9})  # at 20 s
    assert capsys.readouterr().err.count("images") == 1


def test_live_display_takes_every_event_and_clears_up(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveDisplay() as display:
        display.totals(0, 2)
        display.started("k", "tiny [0.5]: search")
        display.progress("k", {"images": 1, "of": 9})
        display.ended("k", "tiny [0.5]: search", "TaskError: [no] reason")
    assert "failed: tiny [0.5]: search: TaskError: [no] reason" in capsys.readouterr().err


def test_display_is_plain_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys, "stderr", cast(Any, SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setenv("NO_COLOR", "1")
    assert isinstance(open_display(), LineDisplay)
