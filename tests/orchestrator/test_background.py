"""BackgroundTracker: the contract of trackers holds, and nobody waits for a slow one.

Oracle: a tracker whose calls wait for an event that the test sets, or never sets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from orchestrator.background import CAPACITY, BackgroundTracker
from orchestrator.tracking import Entry, SweepRun
from tests.orchestrator.tiny_sweep import tiny_sweep

SWEEP = SweepRun(name="demo", digest="d" * 64)


class SlowTracker:
    """A tracker that remembers its calls, each of which waits until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls: list[str] = []
        self.closed = threading.Event()

    def start(self, sweep: SweepRun) -> None:
        self.go.wait()
        self.calls.append(f"start {sweep.name}")

    def log(self, entries: Iterable[Entry]) -> None:
        self.go.wait()
        self.calls += [f"log {entry.key}" for entry in entries]

    def finish(self, state: str, *, entries: Iterable[Entry] = (), **details: Any) -> None:
        self.log(entries)
        self.calls.append(f"finish {state}")
        self.closed.set()


def entry(key: str) -> Entry:
    return Entry(key=key, kind="point", name=key)


@pytest.fixture
def slow() -> Iterable[SlowTracker]:
    tracker = SlowTracker()
    yield tracker
    tracker.go.set()  # lets the thread end


def test_background_calls_return_while_the_tracker_hangs(slow: SlowTracker) -> None:
    tracker = BackgroundTracker(slow, patience_s=0.01)
    tracker.start(SWEEP)
    tracker.log([entry("a")])
    assert slow.calls == []


def test_background_passes_everything_on_in_order(slow: SlowTracker) -> None:
    slow.go.set()
    tracker = BackgroundTracker(slow)
    tracker.start(SWEEP)
    tracker.log([entry("a"), entry("b")])
    tracker.finish("done", entries=[entry("c")])
    assert slow.calls == ["start demo", "log a", "log b", "log c", "finish done"]


def test_background_finish_gives_up_on_a_tracker_that_stands_still(
    slow: SlowTracker, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = BackgroundTracker(slow, patience_s=0.05)
    tracker.start(SWEEP)
    tracker.finish("done", entries=[entry("a")])
    assert "`dipgo-sweep sync` sends it" in caplog.text


def test_background_finish_waits_while_something_is_sent(slow: SlowTracker) -> None:
    """Every entry takes a step; the patience is for one step, not for all of them."""
    slow.go.set()
    tracker = BackgroundTracker(slow, patience_s=30)
    tracker.start(SWEEP)
    tracker.finish("done", entries=(entry(str(number)) for number in range(500)))
    assert len(slow.calls) == 502


def test_background_bounds_what_waits(slow: SlowTracker) -> None:
    tracker = BackgroundTracker(slow)
    tracker.start(SWEEP)
    tracker.log(entry(str(number)) for number in range(10 * CAPACITY))
    slow.go.set()
    tracker.finish("done")
    assert len(slow.calls) <= CAPACITY + 3  # start, finish, and one that was being sent


def test_background_survives_a_tracker_that_raises(
    slow: SlowTracker, caplog: pytest.LogCaptureFixture
) -> None:
    slow.go.set()
    slow.start = _raise  # type: ignore[method-assign]
    tracker = BackgroundTracker(slow)
    tracker.start(SWEEP)
    tracker.finish("done", entries=[entry("a")])
    assert slow.calls == ["log a", "finish done"]
    assert "what is shown is not whole: RuntimeError: http://***@host is away" in caplog.text


def test_sweep_runs_to_its_end_while_the_tracker_hangs(
    slow: SlowTracker, run_with: Callable[[Any], Any]
) -> None:
    """Were a single call waited for, the run would never end: the tracker is stuck until then."""
    result = run_with(BackgroundTracker(slow, patience_s=0.05))
    assert result.done and not result.failed and not result.skipped
    assert slow.calls == []


def _raise(sweep: SweepRun) -> None:
    raise RuntimeError("http://me:secret@host is away")


@pytest.fixture
def run_with(tmp_path: Any) -> Callable[[Any], Any]:
    from orchestrator.driver import run_sweep
    from orchestrator.executors.in_process import InProcessExecutor
    from orchestrator.publish import Publisher
    from orchestrator.store import open_store
    from tests.orchestrator.finished_sweep import run_finished_task, sweep_facts

    def run(tracker: Any) -> Any:
        sweep, store = tiny_sweep(targets=(0.5,)), open_store(str(tmp_path))
        publisher = Publisher(sweep, store, tracker)
        return run_sweep(
            sweep,
            store,
            InProcessExecutor(),
            publisher,
            run_task=run_finished_task,
            facts=sweep_facts(sweep),
        )

    return run
