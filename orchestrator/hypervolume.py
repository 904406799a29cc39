"""The area that points cover above a reference point, both objectives larger = better."""

from __future__ import annotations

import moocore
import numpy as np
import numpy.typing as npt


def area_above(values: npt.ArrayLike, worst: tuple[float, float]) -> float:
    """Return the area between `values`, (points, 2), and `worst`; points beyond it add nothing."""
    rows = np.asarray(values, dtype=np.float64)
    if not rows.size:
        return 0.0
    return float(moocore.hypervolume(rows, ref=worst, maximise=True))
