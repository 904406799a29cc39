"""BackgroundTracker: another tracker on a thread of its own; no sweep waits for a server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from queue import Queue
from typing import Final

from orchestrator.secrets import redact
from orchestrator.tracking import NO_SERIES, Entry, RunState, Series, SweepRun, Tracker

logger = logging.getLogger(__name__)

#: Entries that may wait; more are left to `finish`, which is given all of them again.
CAPACITY: Final = 256

#: How long `finish` waits for a tracker that gets nothing done before it leaves the rest to `sync`.
PATIENCE_S: Final = 90.0


class BackgroundTracker:
    """Passes one sweep on in order; `start` and `log` return at once, whatever a server does.

    `finish` waits as long as the other tracker gets on, and no longer than `patience_s` for one
    step of it. The thread dies with the process: what was not sent follows from the records, and
    `dipgo-sweep sync` sends it.
    """

    def __init__(self, tracker: Tracker, *, patience_s: float = PATIENCE_S) -> None:
        self._tracker = tracker
        self._patience_s = patience_s
        self._waiting: Queue[Callable[[], None]] = Queue()
        self._room = threading.Semaphore(CAPACITY)
        self._moved = threading.Condition()
        self._steps = 0
        self._finished = False
        threading.Thread(target=self._work, name="tracking", daemon=True).start()

    def start(self, sweep: SweepRun) -> None:
        self._waiting.put(partial(self._tracker.start, sweep))

    def log(self, entries: Iterable[Entry]) -> None:
        """Queue entries while there is room; those there is none for are in the store anyway."""
        for entry in entries:
            if self._room.acquire(blocking=False):
                self._waiting.put(partial(self._log, entry))

    def finish(
        self,
        state: RunState,
        *,
        entries: Iterable[Entry] = (),
        folder: Path | None = None,
        series: Series = NO_SERIES,
    ) -> None:
        """Have everything sent and the runs closed, unless the other tracker stands still."""
        last = partial(
            self._tracker.finish,
            state,
            entries=self._counted(entries),
            folder=folder,
            series=series,
        )
        self._waiting.put(partial(self._finish, last))
        if not self._await_end():
            logger.warning(
                "tracking: nothing was sent for %g s, so the rest was left; `dipgo-sweep sync` "
                "sends it (nothing is computed anew)",
                self._patience_s,
            )

    def _await_end(self) -> bool:
        """Wait until the last call is over; False: no step was made for as long as we wait."""
        with self._moved:
            while not self._finished:
                seen = self._steps
                moved = self._moved.wait_for(self._has_moved_since(seen), self._patience_s)
                if not moved:
                    return False
        return True

    def _has_moved_since(self, seen: int) -> Callable[[], bool]:
        return lambda: self._finished or self._steps > seen

    def _log(self, entry: Entry) -> None:
        self._room.release()
        self._tracker.log([entry])

    def _finish(self, last: Callable[[], None]) -> None:
        try:
            last()
        finally:
            self._step(finished=True)

    def _counted(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        for entry in entries:
            yield entry
            self._step()

    def _step(self, *, finished: bool = False) -> None:
        with self._moved:
            self._steps += 1
            self._finished = self._finished or finished
            self._moved.notify_all()

    def _work(self) -> None:
        while not self._finished:
            call = self._waiting.get()
            try:
                call()
            except Exception as error:  # a view must not stop the sweep
                reason = redact(f"{type(error).__name__}: {error}")
                logger.warning("tracking: what is shown is not whole: %s", reason)
            self._step()
