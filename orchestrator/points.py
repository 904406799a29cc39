"""Resolved points: figures, states and gains of every point of a sweep. numpy, no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from dipgo_core.evaluation.intervals import Figure
from dipgo_core.gates import GateTable
from orchestrator.bars import CALIBRATION_METRICS, best_of, calibration_figures, score_for
from orchestrator.gains import Comparisons, Gain, Verdict
from orchestrator.methods import TRIVIAL, Method
from orchestrator.metrics import IMAGE_FIGURES, QUALITIES, figure_text
from orchestrator.planned import Dropped, Point
from orchestrator.point_names import point_name
from orchestrator.records import Record
from orchestrator.search_cost import SearchCost, search_cost
from orchestrator.speeds import speed_of
from orchestrator.store import Store

State = Literal["done", "failed", "pending", "dropped"]
Records = Mapping[str, Record]


@dataclass(frozen=True, kw_only=True)
class ResolvedPoint:
    """One point with all its figures; None = not known (yet). Also what `pareto --json` prints.

    protocol: hash of the protocol the images were made and scored under. figures: what was measured
    of the images, by metric, each with its interval, n, scorer and protocol. device: where latency
    was measured. pruned_ratio, macs_speedup: counted MACs against the model's dense run. speedup,
    latency_ms: measured, end to end; loop_*: the denoising loop alone. `*_low`, `*_high`: ends of
    the 95 % interval. dense_latency_ms: of the dense runs in between. throughput: images per second
    by batch size. peak_memory_mb, energy_j (an image): of the pruned run. latency_usable: False if
    the measurement was disturbed; then there is no speed, and latency_note says what disturbed it.
    subnet: digest of `keep` and `extrapolation`.
    gain: against the best trivial baseline at equal compute, positive = better; that baseline is
    chosen for each metric on calibration prompts (`best_baseline`). gain_over: of a searched point,
    against each trivial baseline at its target, by the baseline's key. gain_random: against the
    mean of the random draws there. search_cost: of the search its gates are from. calibration_*:
    what choices may be based on. task_keys: every task the point rests on. dropped: where a race
    ended for this point, and by metric the point that surely beats it; its figures are those of the
    n_images it had until then.
    """

    key: str
    model: str
    model_id: str
    method: Method
    strategy: str | None
    loss: Mapping[str, Any] | None
    sampler: Mapping[str, Any]
    target: float | None
    seed: int | None
    variant: str | None
    protocol: str
    state: State
    name: str
    granularity: str = "block"
    error: str | None = None
    device: str | None = None
    pruned_ratio: float | None = None
    macs: int | None = None
    macs_speedup: float | None = None
    latency_ms: float | None = None
    latency_ms_low: float | None = None
    latency_ms_high: float | None = None
    dense_latency_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    latency_ms_p95: float | None = None
    loop_ms: float | None = None
    loop_ms_low: float | None = None
    loop_ms_high: float | None = None
    loop_speedup: float | None = None
    loop_speedup_low: float | None = None
    loop_speedup_high: float | None = None
    throughput: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    dense_throughput: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    peak_memory_mb: float | None = None
    energy_j: float | None = None
    latency_usable: bool | None = None
    latency_note: str | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
    n_images: int | None = None
    all_or_nothing_share: float | None = None
    subnet: str | None = None
    keep: tuple[str, ...] | None = None
    extrapolation: float = 0.0
    calibration_psnr: float | None = None
    calibration_ssim: float | None = None
    calibration_clip: float | None = None
    calibration_lpips: float | None = None
    calibration_dino: float | None = None
    calibration_image_reward: float | None = None
    gain: Mapping[str, Gain] = field(default_factory=dict)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    verdict: Verdict | None = None
    gain_over: Mapping[str, Mapping[str, Gain]] = field(default_factory=dict)
    gain_random: Mapping[str, Gain] = field(default_factory=dict)
    search_cost: SearchCost | None = None
    evaluate_key: str | None = None
    latency_key: str | None = None
    task_keys: tuple[str, ...] = ()
    dropped: Dropped | None = None

    @property
    def is_searched(self) -> bool:
        return self.method == "search"

    def beats_trivial(self, metric: str) -> bool:
        """Whether it was searched and surely beats the best trivial baseline in a metric."""
        return self.is_searched and self.verdicts.get(metric) == "beats"

    @property
    def is_explored(self) -> bool:
        """Whether an exploration proposed it."""
        return self.is_searched and self.variant is not None

    @property
    def is_evaluated(self) -> bool:
        """Whether its images were scored; latency may be missing."""
        return self.n_images is not None

    @property
    def measured_under(self) -> str:
        """Hash of the protocol of its figures: one of fewer images than `protocol` says for a point
        that a race has dropped, or not let through yet."""
        hashes = (figure.protocol for figure in self.figures.values() if figure.protocol)
        return next(hashes, self.protocol)

    @property
    def identity(self) -> str:
        """What points have in common that are one SubNet, evaluated once, under several names."""
        return self.evaluate_key or self.key

    def value(self, figure: str) -> float | None:
        """Return a figure of `orchestrator.metrics`; None where it is not known."""
        if figure in IMAGE_FIGURES:
            found = self.figures.get(figure)
            return None if found is None else found.value
        value: float | None = getattr(self, figure)
        return value

    def bounds(self, figure: str) -> tuple[float | None, float | None]:
        """Return the ends of a figure's 95 % interval; (None, None) where it has none."""
        if figure in IMAGE_FIGURES:
            found = self.figures.get(figure)
            return (None, None) if found is None else (found.low, found.high)
        return getattr(self, f"{figure}_low", None), getattr(self, f"{figure}_high", None)

    def interval(self, figure: str) -> tuple[float, float]:
        """Return what a bar is drawn over: the 95 % interval, or the value twice without one."""
        value, (low, high) = self.value(figure), self.bounds(figure)
        assert value is not None
        return (value if low is None else low), (value if high is None else high)

    def scorer(self, figure: str) -> str | None:
        """Return the id of the network behind a figure."""
        found = self.figures.get(figure)
        return None if found is None else found.scorer

    def figure_text(self, figure: str) -> str:
        """Format a figure with its interval, such as ``1.42 [1.38, 1.47]``."""
        found = self.figures.get(figure)
        n = None if found is None else found.n
        return figure_text(figure, self.value(figure), *self.bounds(figure), n=n)

    def to_json(self) -> dict[str, Any]:
        """Return the point as `pareto --json` prints it: each figure by name, with its ends."""
        flat: dict[str, Any] = {}
        for figure in IMAGE_FIGURES:
            low, high = self.bounds(figure)
            flat |= {figure: self.value(figure), f"{figure}_low": low, f"{figure}_high": high}
        scorers = {name: known.scorer for name, known in self.figures.items() if known.scorer}
        over = {
            key: {name: {**asdict(one), "verdict": one.verdict} for name, one in gains.items()}
            for key, gains in self.gain_over.items()
        }
        return {**asdict(self), **flat, "scorers": scorers, "gain_over": over}


def resolve_points(
    points: Sequence[Point],
    records: Records,
    store: Store,
    *,
    quality: str = "clip",
    comparisons: Comparisons | None = None,
) -> tuple[ResolvedPoint, ...]:
    """Return every point with what is known of it so far, in the order given.

    quality: the headline metric, of which `verdict` speaks. comparisons: pass the same one again
    to compute each gain once in a run.
    """
    comparisons = comparisons or Comparisons(store, records)
    named: dict[str, str] = {}
    for point in points:
        named |= {key: point.key for key in point.evaluate_keys if key not in named}
    known = _with_dense([_measured(point, records, store, named) for point in points])
    return tuple(_with_gains(point, known, comparisons, quality) for point in known)


def calibration_score(point: ResolvedPoint, metric: str) -> float | None:
    """Return what a choice for `metric` is based on, larger = better: a calibration figure."""
    figures = {name: getattr(point, f"calibration_{name}") for name in CALIBRATION_METRICS}
    return score_for(metric, figures)


def best_baseline(
    point: ResolvedPoint, points: Iterable[ResolvedPoint], metric: str
) -> ResolvedPoint | None:
    """Return the trivial baseline at the point's target that is best on the calibration prompts.

    None while one of them is unfinished or failed, so that no gain is over a weaker one.
    """
    rivals = trivial_rivals(point, points)
    scores = [calibration_score(rival, metric) if rival.is_evaluated else None for rival in rivals]
    best = best_of(scores)
    return None if best is None else rivals[best]


def trivial_rivals(point: ResolvedPoint, points: Iterable[ResolvedPoint]) -> list[ResolvedPoint]:
    """Return the trivial baselines at the compute of a point."""
    return [rival for rival in points if rival.method in TRIVIAL and _same_budget(rival, point)]


def _same_budget(a: ResolvedPoint, b: ResolvedPoint) -> bool:
    return (a.model, a.protocol, a.target) == (b.model, b.protocol, b.target)


# ---------------------------------------------------------------------------------------------


def _measured(
    point: Point, records: Records, store: Store, named: Mapping[str, str]
) -> ResolvedPoint:
    """Read the point's own records. named: evaluation -> point; the highest one done counts."""
    error = point.error or _failure(point, records, store)
    done = (key for key in reversed(point.evaluate_keys) if key in records)
    evaluate_key = next(done, point.evaluate_key)
    evaluated = _record(records, evaluate_key)
    complete = bool(point.task_keys) and all(key in records for key in point.task_keys)
    lost = point.dropped and replace(
        point.dropped, by={metric: named[key] for metric, key in point.dropped.by.items()}
    )
    resolved = ResolvedPoint(
        key=point.key,
        model=point.model,
        model_id=point.model_id,
        method=point.method,
        strategy=point.strategy,
        loss=point.loss,
        sampler=point.sampler,
        target=point.target,
        seed=point.seed,
        variant=point.variant,
        protocol=point.protocol_hash,
        name=point_name(point),
        granularity=point.granularity,
        state=_state(point, complete, error),
        error=None if complete else error,
        keep=point.keep,
        extrapolation=point.extrapolation,
        subnet=None
        if point.keep is None
        else GateTable.from_strings(point.keep, point.extrapolation).digest,
        **_calibration(_record(records, point.calibration_key)),
        dropped=lost,
        search_cost=search_cost(_record(records, point.search_key), records),
        evaluate_key=evaluate_key,
        latency_key=point.latency_key,
        task_keys=_task_keys(point),
    )
    if evaluated is not None:
        resolved = replace(resolved, **_quality(evaluated))
    timed = _record(records, point.latency_key)
    if timed is None:
        return resolved
    others = (records[key] for key in point.throughput_keys if key in records)
    return replace(resolved, **speed_of(timed, others))


def _state(point: Point, complete: bool, error: str | None) -> State:
    if complete:
        return "done" if point.dropped is None else "dropped"
    return "failed" if error else "pending"


def _task_keys(point: Point) -> tuple[str, ...]:
    """Return every task the point rests on, each once."""
    searched = () if point.search_key is None else (point.search_key,)
    shared = (point.reference_key, *point.statistics_keys)
    keys = (*point.needs, *shared, *searched, *point.task_keys)
    return tuple(dict.fromkeys(keys))


def _failure(point: Point, records: Records, store: Store) -> str | None:
    """Return why a task this point rests on failed, unless it has succeeded since."""
    for key in _task_keys(point):
        failure = None if key in records else store.get_failure(key)
        if failure is not None:
            return f"{failure.kind} task {key[:12]}: {failure.error}"
    return None


def _quality(record: Record) -> dict[str, Any]:
    outputs = record.outputs
    figures = {
        name: Figure.from_json(figure)
        for name, figure in outputs["metrics"].items()
        if name in IMAGE_FIGURES
    }
    return {
        "figures": figures,
        "n_images": max((figure.n for figure in figures.values()), default=None),
        "macs": outputs.get("macs", {}).get("kept"),
        "pruned_ratio": outputs.get("pruned_ratio"),
        "all_or_nothing_share": outputs.get("all_or_nothing_share"),
    }


def _with_dense(points: Sequence[ResolvedPoint]) -> list[ResolvedPoint]:
    """Add what needs the dense run: pruned ratio, MACs speed-up, and the dense run's own speed."""
    dense = {(p.model, p.protocol): p for p in points if p.method == "dense"}
    resolved = []
    for point in points:
        base = dense.get((point.model, point.protocol))
        if base is not None and base.macs and point.macs:
            point = replace(
                point,
                pruned_ratio=1 - point.macs / base.macs,
                macs_speedup=base.macs / point.macs,
            )
        if point.method == "dense" and point.speedup is None:
            point = _dense_speed(point, points)
        resolved.append(point)
    return resolved


def _dense_speed(dense: ResolvedPoint, points: Sequence[ResolvedPoint]) -> ResolvedPoint:
    """Time the dense run by the dense halves of its siblings' interleaved measurements.

    What disturbed a measurement of its own stays in the note.
    """
    peers = [p for p in points if (p.model, p.protocol) == (dense.model, dense.protocol)]
    times = {p.latency_key: p.dense_latency_ms for p in peers if p.dense_latency_ms is not None}
    if not times:
        return dense
    notes = ["timed by the dense halves of its siblings' measurements"]
    if dense.latency_note is not None:
        notes.append(f"its own measurement: {dense.latency_note}")
    return replace(
        dense,
        speedup=1.0,
        latency_ms=statistics.median(times.values()),
        device=next(p.device for p in peers if p.dense_latency_ms is not None),
        latency_usable=True,
        latency_note="; ".join(notes),
    )


def _with_gains(
    point: ResolvedPoint,
    points: Sequence[ResolvedPoint],
    comparisons: Comparisons,
    quality: str,
) -> ResolvedPoint:
    if not point.is_evaluated or point.target is None:
        return point
    peers = [p for p in points if (p.model, p.protocol) == (point.model, point.protocol)]

    def over(metric: str, rivals: Sequence[ResolvedPoint]) -> Gain | None:
        return comparisons.gain(
            metric, _evaluated(point), {rival.key: _evaluated(rival) for rival in rivals}
        )

    measured = [metric for metric in QUALITIES if metric in point.figures]
    bars = {metric: best_baseline(point, peers, metric) for metric in measured}
    gains = {metric: over(metric, [bar]) for metric, bar in bars.items() if bar is not None}
    gain = _known(gains)
    rivals = [r for r in trivial_rivals(point, peers) if r.is_evaluated and point.is_searched]
    like = (point.target, point.granularity)
    draws = [p for p in peers if p.method == "random" and (p.target, p.granularity) == like]
    drawn = [p for p in draws if p.is_evaluated] if point.is_searched else []
    pending = any(p.state == "pending" for p in draws)
    over_random = {m: over(m, drawn) for m in measured} if drawn and not pending else {}
    verdicts = {metric: value.verdict for metric, value in gain.items()}
    return replace(
        point,
        gain=gain,
        verdicts=verdicts,
        verdict=verdicts.get(quality),
        gain_over={r.key: _known({m: over(m, [r]) for m in measured}) for r in rivals},
        gain_random=_known(over_random),
    )


def _known(gains: Mapping[str, Gain | None]) -> dict[str, Gain]:
    return {metric: found for metric, found in gains.items() if found is not None}


def _record(records: Records, key: str | None) -> Record | None:
    return None if key is None else records.get(key)


def _evaluated(point: ResolvedPoint) -> str:
    assert point.evaluate_key is not None
    return point.evaluate_key


def _calibration(record: Record | None) -> dict[str, Any]:
    return {f"calibration_{name}": value for name, value in calibration_figures(record).items()}
