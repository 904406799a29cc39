"""Overlap: one thread works on what was made while the next is being made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
Result = TypeVar("Result")

#: What may wait for the thread: enough that neither side idles, few enough to fit in memory.
AHEAD = 2


def overlapped(
    made: Iterable[Made], work: Callable[[Made], Result], *, ahead: int = AHEAD
) -> Generator[Result, None, None]:
    """Yield `work` of each thing made, in order.

    Things are made in the caller's thread, worked on in one other thread; at most `ahead` of them
    wait, one is worked on. The first error on either side stops both and is raised here, once. The
    thread is gone when the iterator ends, fails or is closed.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dipgo-overlap")
    try:
        for one in made:
            waiting.append(pool.submit(work, one))
            del one  # else the last one made is held while the next is made
            while waiting and (len(waiting) > ahead or waiting[0].done()):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(frozen=True, eq=False)
class Handed:
    """Images given to another thread. ready: None on the CPU, else marks when they are complete."""

    images: Tensor
    ready: Any = None


def hand_over(images: Tensor) -> Handed:
    """Return the images with a mark on the current CUDA stream, to be taken by `OwnStream`."""
    if images.device.type != "cuda":
        return Handed(images)
    return Handed(images, torch.cuda.current_stream(images.device).record_event())


class OwnStream:
    """A CUDA stream for one thread's kernels, so that they run beside those of the maker.

    On the CPU it does nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def run(self, handed: Handed, work: Callable[[Tensor], Result]) -> Result:
        """Return work(images), on this stream and not before the images are complete.

        The memory of the images is not used again before this stream is done with it.
        """
        stream = self._stream
        if stream is not None:
            stream.wait_event(handed.ready)
            handed.images.record_stream(stream)
        with nullcontext() if stream is None else torch.cuda.stream(stream), torch.no_grad():
            return work(handed.images)
