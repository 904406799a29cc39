"""GateTable: which block is computed at which call, and how skipped calls predict."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dipgo_core.errors import SubNetError

#: The largest share of a change that is carried on: beyond it predictions swing.
MOST_EXTRAPOLATED = 2.0


@dataclass(frozen=True, eq=False)
class GateTable:
    """keep[call, block]: True = compute now, False = reuse what the block last computed.

    Column 0 is the denoiser itself (False = skip the call). The first call is computed whole.

    extrapolation: what a skipped call predicts: the last prediction that was computed, plus this
    share of how predictions changed between the last two of them, carried on to this call. 0
    repeats the last prediction, 1 goes on along a straight line.

    Raises:
        SubNetError: the table is not two-dimensional and boolean, its first call reuses, or the
            extrapolation is not in [0, 2].
    """

    keep: npt.NDArray[np.bool_]  # (T, N)
    extrapolation: float = 0.0

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
        if not (math.isfinite(self.extrapolation) and 0 <= self.extrapolation <= MOST_EXTRAPOLATED):
            raise SubNetError(
                f"extrapolation must be between 0 and {MOST_EXTRAPOLATED:g}, got "
                f"{self.extrapolation}"
            )
        keep.flags.writeable = False
        object.__setattr__(self, "keep", keep)
        object.__setattr__(self, "extrapolation", float(self.extrapolation))  # one digest

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
    def from_strings(cls, rows: Sequence[str], extrapolation: float = 0.0) -> GateTable:
        """Read rows such as ``"1101"``; one string a call, one character a block."""
        widths = {len(row) for row in rows}
        if len(widths) != 1 or not set("".join(rows)) <= {"0", "1"}:
            raise SubNetError("keep must be strings of 0 and 1, all of one length")
        return cls(
            np.array([[c == "1" for c in row] for row in rows], dtype=np.bool_), extrapolation
        )

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
        """SHA-256 of the rows, and the extrapolation where there is one; equal tables have equal
        digests."""
        lines = self.to_strings()
        if self.extrapolation:
            lines.append(f"extrapolation {self.extrapolation!r}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def all_or_nothing_share(self) -> float:
        """Share of calls that compute everything or nothing; 1.0 = a step schedule in disguise."""
        whole = self.keep.all(axis=1) | ~self.keep.any(axis=1)
        return float(whole.mean())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, GateTable)
            and np.array_equal(self.keep, other.keep)
            and self.extrapolation == other.extrapolation
        )

    def __hash__(self) -> int:
        return hash(self.digest)
