"""GateTable: which block is computed at which call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dipgo_core.errors import SubNetError


@dataclass(frozen=True, eq=False)
class GateTable:
    """keep[call, block]: True = compute now, False = reuse what the block last computed.

    Column 0 is the denoiser itself (False = skip the call). The first call is computed whole.

    Raises:
        SubNetError: the table is not two-dimensional and boolean, or its first call reuses.
    """

    keep: npt.NDArray[np.bool_]  # (T, N)

    def __post_init__(self) -> None:
        keep = np.array(self.keep)
        if keep.dtype != np.bool_ or keep.ndim != 2 or keep.size == 0:
            raise SubNetError(
                f"keep must be a non-empty boolean table (calls, blocks), got {keep.dtype} "
                f"of shape {keep.shape}"
            )
        if not keep[0].all():
            reused = np.flatnonzero(~keep[0]).tolist()
            raise SubNetError(
                f"the first call must compute every block, but keep[0] reuses blocks {reused}"
            )
        keep.flags.writeable = False
        object.__setattr__(self, "keep", keep)

    @classmethod
    def all_keep(cls, num_calls: int, num_blocks: int) -> GateTable:
        return cls(np.ones((num_calls, num_blocks), dtype=np.bool_))

    @classmethod
    def from_calls(cls, computed: Iterable[int], num_calls: int, num_blocks: int) -> GateTable:
        """Compute the calls in `computed` whole and skip all others.

        Raises:
            SubNetError: a call is outside the run, or the first is not among them.
        """
        calls = sorted(set(computed))
        outside = [call for call in calls if not 0 <= call < num_calls]
        if outside:
            raise SubNetError(f"computed calls must be 0 to {num_calls - 1}, got {outside}")
        keep = np.zeros((num_calls, num_blocks), dtype=np.bool_)
        keep[calls] = True
        return cls(keep)

    @classmethod
    def from_strings(cls, rows: Sequence[str]) -> GateTable:
        """Read rows such as ``"1101"``; one string a call, one character a block."""
        widths = {len(row) for row in rows}
        if len(widths) != 1 or not set("".join(rows)) <= {"0", "1"}:
            raise SubNetError("keep must be strings of 0 and 1, all of one length")
        return cls(np.array([[c == "1" for c in row] for row in rows], dtype=np.bool_))

    def to_strings(self) -> list[str]:
        return ["".join("1" if k else "0" for k in row) for row in self.keep]

    @property
    def num_calls(self) -> int:
        return int(self.keep.shape[0])

    @property
    def num_blocks(self) -> int:
        return int(self.keep.shape[1])

    @property
    def digest(self) -> str:
        """SHA-256 of the rows; equal tables have equal digests."""
        return hashlib.sha256("\n".join(self.to_strings()).encode()).hexdigest()

    @property
    def all_or_nothing_share(self) -> float:
        """Share of calls that compute everything or nothing; 1.0 = a step schedule in disguise."""
        whole = self.keep.all(axis=1) | ~self.keep.any(axis=1)
        return float(whole.mean())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GateTable) and np.array_equal(self.keep, other.keep)

    def __hash__(self) -> int:
        return hash(self.digest)
