"""A disk that kills, fails or waits at the n-th system call that changes it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from orchestrator.store import disk

#: Calls of orchestrator/store/disk.py after which the disk is another than before, or should be.
WRITES = ("open", "write", "fsync", "close", "replace", "link", "unlink", "mkdir", "rmdir")

Fault = Callable[[str, tuple[Any, ...]], None]


class FaultyOs:
    """The module `os` for `disk`: `fault(call, arguments)` is asked before each write.

    It syncs nothing, for speed: what is lost with the machine is not what these tests lose.
    """

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in WRITES:
            return real

        def call(*given: Any, **options: Any) -> Any:
            self.calls.append(name)
            self._fault(name, given)
            return None if name == "fsync" else real(*given, **options)

        return call


def at(number: int, act: Fault) -> Fault:
    """Return a fault that acts at one call, counted from 1."""
    count = 0

    def fault(call: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        count += 1
        if count == number:
            act(call, given)

    return fault


def kill(call: str, given: tuple[Any, ...]) -> None:
    """Die at once, half of what was to be written on the disk."""
    if call == "write":
        os.write(given[0], bytes(given[1])[: len(given[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def failing(error: int) -> Fault:
    """Return a fault that fails as the operating system would, e.g. with errno.ENOSPC."""

    def fail(call: str, given: tuple[Any, ...]) -> None:
        if call == "close":
            os.close(given[0])  # which closes, whatever it tells
        raise OSError(error, os.strerror(error))

    return fail


def slow(seconds: float) -> Fault:
    return lambda call, given: time.sleep(seconds)


def deaths(work: Callable[[int], None], most: int = 10_000) -> int:
    """Run `work(n)` in a child that is killed at its n-th write, n = 1, 2, ... until one survives.

    Returns how many died. The process that calls this must have no threads.
    """
    for number in range(1, most):
        child = os.fork()
        if child == 0:
            disk.os = FaultyOs(at(number, kill))  # type: ignore[attr-defined,assignment]
            with suppress(BaseException):
                work(number)
                os._exit(0)
            os._exit(1)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, f"the child of fault {number} failed"
            return number - 1
    raise AssertionError("the work never ends")
