"""How long tasks take: from records of tasks like them, else from MACs and what devices can do.

The time of a task grows with what it does (`Effort`): seconds = a + b * images + c * MACs, with
a, b, c >= 0 fitted to records of the same kind of work, model and device. Pure, no torch.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from orchestrator.efforts import Effort, Efforts
from orchestrator.records import Record

#: Dense 16-bit TFLOP/s by name of the device, from the vendors' data sheets.
PEAKS: Final[Mapping[str, float]] = {
    "H200": 989, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312, "A800": 312, "A10": 125,
    "L40S": 362, "L40": 181, "L4": 121, "V100": 125, "T4": 65, "4090": 165, "3090": 71,
    "MI300X": 1307, "MI250": 383,
}  # fmt: skip
_GPU_PEAK, _CPU_PEAK = 100.0, 0.1
_UTILISATION = 0.35
#: Seconds an image takes beside the denoiser (decoding, scoring), and a task beside its images.
_IMAGE_S: Final = {True: 0.05, False: 0.1}
_TASK_S = 1.0
_LATENCY_S = 15.0
#: Less than this is looking up what was imported before.
_IMPORTED_S = 0.1
#: Before any record: starting a worker (imports), loading a pipeline, handing a task out.
_STARTUP_S, _LOAD_S, _DISPATCH_S = 10.0, 10.0, 0.05
#: A longer pause between two tasks of a worker is taken as one in which there was nothing to do.
_LONGEST_GAP_S = 2.0
#: Latest records kept of each kind of work.
_KEPT = 256
#: A law with more terms must fit this much better.
_BETTER = 0.9


@dataclass(frozen=True, slots=True)
class Sample:
    """What one record tells of time. seconds: without loading. load, imports: 0 where none was.

    worker: the process. finished: epoch.
    """

    effort: Effort
    device: str
    seconds: float
    load: float = 0.0
    imports: float = 0.0
    worker: str = ""
    finished: float = 0.0

    @property
    def began(self) -> float:
        return self.finished - self.seconds - self.load

    @classmethod
    def of_record(cls, record: Record, efforts: Efforts) -> Sample:
        timings, host = record.timings, record.host
        load = timings.get("load", 0.0)
        return cls(
            effort=efforts.of_record(record),
            device=str(host.get("device", "")),
            seconds=max(0.0, timings.get("seconds", 0.0) - load),
            load=load,
            imports=imports if (imports := timings.get("imports", 0.0)) > _IMPORTED_S else 0.0,
            worker=f"{host.get('hostname')}/{host.get('pid')}",
            finished=timings.get("finished", 0.0),
        )

    def to_json(self) -> list[Any]:
        rest = (self.device, self.seconds, self.load, self.imports, self.worker, self.finished)
        return [self.effort.to_json(), *rest]

    @classmethod
    def from_json(cls, data: Sequence[Any]) -> Sample:
        return cls(Effort(*data[0]), *data[1:])


@dataclass(frozen=True)
class Law:
    """seconds = constant + per_image * images + per_tmac * 10^12 MACs, and how well it held.

    count: records it was fitted to. error: their median relative deviation.
    """

    constant: float
    per_image: float
    per_tmac: float
    count: int = 0
    error: float = 0.0

    def seconds(self, effort: Effort) -> float:
        return self.constant + self.per_image * effort.images + self.per_tmac * effort.tmacs


class Estimates:
    """Expected seconds of tasks, of pipeline loads, of starting workers and handing tasks out.

    device: the name of the device that GPU tasks are expected to run on.
    """

    def __init__(self, samples: Iterable[Sample] = (), device: str = "") -> None:
        self.device = device
        self._count = 0
        self._groups: dict[tuple[str, bool], deque[Sample]] = defaultdict(
            partial(deque, maxlen=_KEPT)
        )
        self._loads: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=_KEPT))
        self._imports: deque[float] = deque(maxlen=_KEPT)
        self._gaps: deque[float] = deque(maxlen=_KEPT)
        self._finished: dict[str, float] = {}  # by worker
        self._laws: dict[tuple[str, str, bool], tuple[Law, str]] = {}
        for sample in sorted(samples, key=lambda sample: sample.finished):
            self.add(sample)

    def __len__(self) -> int:
        return self._count

    def add(self, sample: Sample) -> None:
        """Learn from another record; samples of one worker come in the order they finished."""
        self._count += 1
        self._groups[sample.effort.group, sample.effort.gpu].append(sample)
        if sample.load:
            self._loads[sample.effort.model].append(sample.load)
        if sample.imports:
            self._imports.append(sample.imports)
        gap = sample.began - self._finished.get(sample.worker, -math.inf)
        if 0 <= gap <= _LONGEST_GAP_S:
            self._gaps.append(gap)
        self._finished[sample.worker] = sample.finished
        self._laws.clear()

    def seconds(self, effort: Effort) -> float:
        """Return how long a task of this size takes, without loading its pipeline."""
        return self._law(effort)[0].seconds(effort)

    def basis(self, effort: Effort) -> str:
        """Say in a few words where the estimate for such a task comes from."""
        return self._law(effort)[1]

    def load_s(self, model: str, *, apart: bool = False) -> float:
        """Return how long a worker takes to load the pipeline of a model.

        apart: in a process of its own, which imports the libraries first.
        """
        if not model:
            return 0.0
        every = [load for loads in self._loads.values() for load in loads]
        load = median(self._loads.get(model) or every or [_LOAD_S])
        return load + self.startup_s if apart else load

    @property
    def startup_s(self) -> float:
        """How long a new worker takes before its first task: it imports the libraries."""
        return median(self._imports or [_STARTUP_S])

    @property
    def dispatch_s(self) -> float:
        """How long a worker waits between two tasks when there is work."""
        return median(self._gaps or [_DISPATCH_S])

    def _law(self, effort: Effort) -> tuple[Law, str]:
        key = (effort.group, effort.model, effort.gpu)
        if key not in self._laws:
            self._laws[key] = self._found(effort)
        return self._laws[key]

    def _found(self, effort: Effort) -> tuple[Law, str]:
        """Fit records of this model, else of any model, else take what the device could do."""
        alike = list(self._groups.get((effort.group, effort.gpu), ()))
        own = [sample for sample in alike if sample.effort.model == effort.model]
        chosen = _of_one_device(own or alike, self.device)
        if not chosen:
            return _prior(effort, self.device)
        law = fit(chosen)
        whose = "" if own else " of other models"
        where = chosen[0].device or "an unknown device"
        return law, f"{law.count} records{whose} on {where}, within {law.error:.0%}"


def _of_one_device(samples: Sequence[Sample], device: str) -> list[Sample]:
    """Return the samples of a device: the one asked for, else the one that has most."""
    by_device: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        by_device[sample.device].append(sample)
    return by_device.get(device) or max(by_device.values(), key=len, default=[])


def fit(samples: Sequence[Sample]) -> Law:
    """Fit the law to samples by least squares of relative errors, with no negative term.

    Of laws that fit about as well the one with fewer terms counts, MACs before images before a
    constant: it holds for tasks of other sizes as well.
    """
    sizes = np.array([[1.0, s.effort.images, s.effort.tmacs] for s in samples])
    times = np.maximum(np.array([s.seconds for s in samples]), 1e-3)
    best, best_error = np.array([float(np.median(times)), 0.0, 0.0]), np.inf
    for columns in ((2,), (1,), (0,), (1, 2), (0, 2), (0, 1), (0, 1, 2)):
        law = _least_squares(sizes, times, columns)
        if law is None:
            continue
        error = float(np.square(sizes @ law / times - 1).mean())
        if error < _BETTER * best_error:
            best, best_error = law, error
    error = float(np.median(np.abs(sizes @ best / times - 1)))
    return Law(float(best[0]), float(best[1]), float(best[2]), len(samples), error)


def _least_squares(
    sizes: npt.NDArray[np.float64], times: npt.NDArray[np.float64], columns: tuple[int, ...]
) -> npt.NDArray[np.float64] | None:
    """Return the terms of these columns, None where records do not tell them apart."""
    if len(columns) > len(times):
        return None
    rows = sizes[:, columns] / times[:, None]
    scale = np.abs(rows).max(axis=0)
    if not scale.all():
        return None
    found, _, rank, _ = np.linalg.lstsq(rows / scale, np.ones(len(times)), rcond=1e-6)
    if rank < len(columns) or (found < 0).any():
        return None
    law = np.zeros(3)
    law[list(columns)] = found / scale
    return law


def _prior(effort: Effort, device: str) -> tuple[Law, str]:
    """Return what MACs and data sheets say; a rough guess, and it says so."""
    peak = _peak(device) if effort.gpu else _CPU_PEAK
    per_tmac = 2.0 / (_UTILISATION * peak)
    constant = _LATENCY_S if effort.group == "latency" else _TASK_S
    made = effort.group.startswith(("images", "statistics"))
    per_image = _IMAGE_S[effort.gpu] if made else 0.0
    where = f"{device or 'a GPU'}" if effort.gpu else "a CPU"
    basis = f"no record yet: MACs at {_UTILISATION:.0%} of {peak:g} TFLOP/s ({where})"
    return Law(constant, per_image, per_tmac), basis


def _peak(device: str) -> float:
    named = [name for name in PEAKS if name in device]
    return PEAKS[max(named, key=len)] if named else _GPU_PEAK
