"""Overlap: order, bound, errors of either side, threads; the CUDA part with fakes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dipgo_core.evaluation.overlap import Handed, OwnStream, hand_over, overlapped


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("dipgo-overlap")]


def test_results_come_in_order_from_another_thread() -> None:
    workers: set[str] = set()

    def square(number: int) -> int:
        workers.add(threading.current_thread().name)
        return number * number

    assert list(overlapped(range(20), square)) == [i * i for i in range(20)]
    assert len(workers) == 1
    assert threading.current_thread().name not in workers
    assert threads() == []


def test_the_next_is_made_while_one_is_worked_on() -> None:
    second_made = threading.Event()

    def made() -> Iterator[int]:
        yield 0
        second_made.set()
        yield 1

    # working on the first waits until the second is made: a loop without overlap would hang
    assert list(overlapped(made(), lambda i: second_made.wait(20))) == [True, True]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_never_more_wait_than_allowed(ahead: int) -> None:
    done = threading.Semaphore(0)
    finished: list[int] = []
    most = 0

    def made() -> Iterator[int]:
        nonlocal most
        for i in range(10):
            most = max(most, i - len(finished))
            done.release()
            yield i

    def work(i: int) -> None:
        done.acquire()
        finished.append(i)

    list(overlapped(made(), work, ahead=ahead))
    assert finished == list(range(10))
    assert most <= ahead + 1


def test_error_in_the_thread_stops_the_maker_and_is_raised_once() -> None:
    made: list[int] = []

    def numbers() -> Iterator[int]:
        for i in range(100):
            made.append(i)
            yield i

    with pytest.raises(ZeroDivisionError):
        list(overlapped(numbers(), lambda i: 1 // (i - 1), ahead=2))
    assert len(made) <= 5
    assert threads() == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_error_of_the_maker_stops_the_thread(error: type[BaseException]) -> None:
    worked: list[int] = []

    def numbers() -> Iterator[int]:
        yield 0
        raise error("broken")

    with pytest.raises(error, match="broken"):
        list(overlapped(numbers(), worked.append))
    assert threads() == []


def test_closing_leaves_no_thread_and_no_waiting_work() -> None:
    running = overlapped(iter(range(100)), lambda i: i)
    assert next(running) == 0
    assert len(threads()) == 1
    running.close()
    assert threads() == []


def test_on_the_cpu_images_are_handed_over_as_they_are() -> None:
    images = torch.zeros(2, 3, 4, 4, requires_grad=True)
    handed = hand_over(images)
    doubled = OwnStream(torch.device("cpu")).run(handed, lambda pixels: pixels * 2)
    assert (handed.images is images, handed.ready, doubled.requires_grad) == (True, None, False)


class FakeStream:
    """Notes what is asked of a CUDA stream."""

    def __init__(self, log: list[Any]) -> None:
        self._log = log

    def wait_event(self, event: str) -> None:
        self._log.append(("wait", event))


def test_on_cuda_work_waits_for_the_images_and_keeps_their_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[Any] = []
    stream = FakeStream(log)

    @contextmanager
    def current(chosen: FakeStream) -> Iterator[None]:
        log.append(("on", chosen is stream))
        yield
        log.append("off")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", current)
    images = SimpleNamespace(record_stream=lambda one: log.append(("keep", one is stream)))

    OwnStream(torch.device("cuda")).run(Handed(images, "made"), lambda pixels: log.append("work"))

    assert log == [("wait", "made"), ("keep", True), ("on", True), "work", "off"]


def test_on_cuda_the_mark_is_on_the_makers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    maker = SimpleNamespace(record_event=lambda: "made")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: maker)
    images = SimpleNamespace(device=torch.device("cuda"))
    assert hand_over(images).ready == "made"
