"""Ending a run: `stop` asks its driver through the store, SIGTERM asks the one in this process."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event as Flag
from types import FrameType

from orchestrator.cli.show import say
from orchestrator.store import open_store
from orchestrator.sweep_file import load_sweep


def stop_and_show(file: Path, overrides: Sequence[str]) -> None:
    """Ask whoever runs a sweep to let running tasks end and to start none.

    Raises:
        DipgoError: the sweep file has errors, or the store cannot be used.
    """
    sweep = load_sweep(file, overrides)
    store = open_store(sweep.storage)
    holder = store.runner(sweep.name)
    if holder is None:
        say(f"nobody runs {sweep.name} in {store.url}")
        return
    store.request_stop(sweep.name)
    say(
        f"{holder} lets the tasks of {sweep.name} that are running end, and starts no more; what "
        "is finished is kept"
    )


@contextmanager
def drained_by_sigterm() -> Iterator[Flag]:
    """Yield a flag that the first SIGTERM sets; the second one interrupts, as Ctrl-C does."""
    flag = Flag()

    def asked(number: int, frame: FrameType | None) -> None:
        if flag.is_set():
            raise KeyboardInterrupt
        flag.set()
        say("ending: running tasks may finish; once more to end at once", stderr=True)

    before = signal.signal(signal.SIGTERM, asked)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGTERM, before)
