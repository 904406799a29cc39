"""The desk: a small actor where lanes ask for work, and whose events the driver reads."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.failures import Failure
from orchestrator.records import Record, Task

_MOST_CALLS = 10_000  # each lane holds one open, and a cluster has fewer


@dataclass(frozen=True, kw_only=True)
class Asking:
    """A lane asks for work, and hands in what became of the last one.

    result: None at the first time. written: the lane's own probe of the storage. problem: why its
    node cannot be given any work.
    """

    lane: str
    node: str
    host: str
    held: tuple[str, ...] = ()
    result: Record | Failure | None = None
    written: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Progress:
    """What a task reports while it runs."""

    lane: str
    key: str
    report: Mapping[str, Any] = field(default_factory=dict)


Event = Asking | Progress


class Desk:
    """Passes askings to the driver and its answers back; knows nothing of tasks."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._news = asyncio.Event()
        self._closed = asyncio.Event()
        self._answers: dict[str, asyncio.Future[Task | None]] = {}

    async def ask(self, asking: Asking) -> Task | None:
        """Wait for a task; None tells the lane to retire."""
        if self._closed.is_set():
            return None
        answer: asyncio.Future[Task | None] = asyncio.get_running_loop().create_future()
        self._answers[asking.lane] = answer
        await self.tell(asking)
        return await answer

    async def tell(self, event: Event) -> None:
        self._events.append(event)
        self._news.set()

    async def events(self, timeout_s: float) -> list[Event]:
        """Return what happened since the last call; wait for it, but not longer than told."""
        try:
            await asyncio.wait_for(self._news.wait(), timeout_s)
        except TimeoutError:
            return []
        self._news.clear()
        found, self._events = self._events, []
        return found

    async def answer(self, orders: Mapping[str, Task | None]) -> None:
        """Give waiting lanes their tasks, or None to retire."""
        for lane, order in orders.items():
            waiting = self._answers.pop(lane, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(order)

    async def close(self) -> None:
        """Send everybody home: those who wait, and those who work (`closed`)."""
        self._closed.set()
        await self.answer(dict.fromkeys(list(self._answers)))

    async def closed(self) -> None:
        """Return when the run is over."""
        await self._closed.wait()


def open_desk() -> Any:
    """Start the desk on the driver's node, where it lives as long as the driver."""
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Desk)
        .options(
            num_cpus=0,
            max_concurrency=_MOST_CALLS,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote()
    )
