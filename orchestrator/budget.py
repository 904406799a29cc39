"""Budget: what a sweep has spent, in which runs whatever, and which limit it has reached."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Final

from dipgo_core.errors import StoreError
from orchestrator.store import Store
from orchestrator.sweep_settings import Budget

logger = logging.getLogger(__name__)

#: What the runs of a sweep have spent so far, in its folder of the store.
SPENT: Final = "spent.json"

#: At most so much of what was spent is forgotten when a driver is killed.
_WRITE_EVERY_S = 10.0


class Meter:
    """Counts GPU time of one sweep over all its runs, and the wall time of this one.

    A task that runs counts while it runs; an attempt that failed counts too.
    """

    def __init__(
        self, budget: Budget, store: Store, sweep: str, clock: Callable[[], float]
    ) -> None:
        self._budget = budget
        self._store = store
        self._sweep = sweep
        self._clock = clock
        self._began = clock()
        self._running: dict[str, tuple[float, float]] = {}  # key -> since, GPUs
        self._gpu_seconds = self._written = _read(store, sweep)
        self._wrote = self._began

    def start(self, key: str, gpus: float) -> None:
        self._running[key] = (self._clock(), gpus)

    def end(self, key: str) -> None:
        """Count a task that ended, from its hand-out on: waiting holds a GPU as work does.

        The seconds in its record may be those of another sweep's worker.
        """
        since, gpus = self._running.pop(key, (0.0, 0.0))
        self._gpu_seconds += gpus * (self._clock() - since)

    @property
    def gpu_hours(self) -> float:
        now = self._clock()
        running = sum(gpus * (now - since) for since, gpus in self._running.values())
        return (self._gpu_seconds + running) / 3600

    @property
    def wall_hours(self) -> float:
        return (self._clock() - self._began) / 3600

    def reached(self) -> str | None:
        """Say which limit is reached, None if none is."""
        return limit_reached(self._budget, self.gpu_hours, self.wall_hours)

    def write(self, *, now: bool = False) -> None:
        """Note what was spent, now and then, or now."""
        due = now or self._clock() - self._wrote >= _WRITE_EVERY_S
        spent = self.gpu_hours * 3600
        if not due or spent == self._written:
            return
        self._wrote, self._written = self._clock(), spent
        document = {"gpu_seconds": round(spent, 3)}
        try:
            self._store.put_sweep_file(self._sweep, SPENT, json.dumps(document).encode())
        except StoreError as error:
            logger.warning("what the sweep has spent could not be noted: %s", error)


def limit_reached(budget: Budget, gpu_hours: float, wall_hours: float) -> str | None:
    """Return the limit that these figures reach in words, the first of several."""
    usd = gpu_hours * (budget.usd_per_gpu_hour or 0.0)
    limits = (
        (budget.gpu_hours, gpu_hours, "{:g} GPU-hours"),
        (budget.usd, usd, "{:g} US dollars"),
        (budget.wall_hours, wall_hours, "{:g} hours of wall time"),
    )
    return next(
        (
            words.format(limit)
            for limit, value, words in limits
            if limit is not None and value >= limit
        ),
        None,
    )


def spent_gpu_hours(store: Store, sweep: str) -> float:
    """Return the GPU-hours that all runs of a sweep have taken so far."""
    return _read(store, sweep) / 3600


def _read(store: Store, sweep: str) -> float:
    data = store.get_sweep_file(sweep, SPENT)
    if data is None:
        return 0.0
    try:
        return float(json.loads(data)["gpu_seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{store.sweep_file_place(sweep, SPENT)} is not what a run wrote ({error}): mend it, "
            'as {"gpu_seconds": 0}, or delete it to count from nothing'
        ) from error
