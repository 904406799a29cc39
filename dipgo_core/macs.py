"""MACs: multiply-accumulates of whatever runs, counted by owner, in both conventions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

#: Convolutions and linear layers: what the paper counts. Attention products run as bmm or sdpa.
_PAPER_OPS = frozenset((aten.convolution, aten._convolution, aten.mm, aten.addmm))


class MacsCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the MACs of every operator that runs inside, for the current owner.

    Source: the formulas of ``torch.utils.flop_counter`` (two floating point operations a MAC).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.all: defaultdict[int, int] = defaultdict(int)  # owner -> MACs
        self.paper: defaultdict[int, int] = defaultdict(int)
        self._owner = 0

    @contextmanager
    def owned_by(self, owner: int) -> Iterator[None]:
        """Charge `owner` while the block runs."""
        previous, self._owner = self._owner, owner
        try:
            yield
        finally:
            self._owner = previous

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        formula: Callable[..., int] | None = flop_registry.get(packet)
        if formula is not None:
            macs = formula(*args, **kwargs, out_val=out) // 2
            self.all[self._owner] += macs
            if packet in _PAPER_OPS:
                self.paper[self._owner] += macs
        return out
