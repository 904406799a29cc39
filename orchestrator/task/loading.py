"""Time a worker spends on loading networks, apart from the work it loads them for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_spent = 0.0


@contextmanager
def loading() -> Iterator[None]:
    """Count the time spent inside as loading."""
    global _spent
    began = time.perf_counter()
    try:
        yield
    finally:
        _spent += time.perf_counter() - began


def loading_seconds() -> float:
    """Return how long this process has spent on loading so far."""
    return _spent
