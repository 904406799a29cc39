"""Racing: which points of a model need no more images, decided by simultaneous bounds. numpy only.

Every point is measured with few images first (a rung), and goes on to more only if the top rung may
still put it on a front. A point is dropped if, for *every* raced metric, some other point that is
at least as fast *surely* beats it: at the top rung it will be on no front against these metrics.

At least as fast: by counted MACs exactly, by measured speed if the 95 % interval of the ratio lies
at or above 1, as on the fronts (`standing`). Speeds are not measured again at higher rungs; one
that is not known beats nothing and is beaten by nothing. Points that are one SubNet are one
candidate.

"Surely" is simultaneous over all pairs of points that matter, all metrics and all rungs, so that
the chance that a race drops anything that the top rung would put on a front stays near `ALPHA`:

- What is bounded: the difference of two points at the top rung, of which the images so far are the
  first ones. With n of N images seen, of equally many from every prompt, its error has variance
  s^2 (1/n - 1/N) or less, s^2 that of one image: drawing without replacement (Cochran 1977,
  "Sampling techniques", section 2.6). So single images are resampled, where every other interval
  resamples prompts: the claim is about the same prompts. Where prompts are shown once, the two are
  one. (Whether a point would also lose on other prompts is what the intervals of the fronts say.)
- Pairs and metrics: the single-step max-t bootstrap. All figures are resampled with the same draws,
  so that differences keep their correlation. Each difference is divided by its bootstrap standard
  error; the critical value is the quantile of the largest studentised deviation over all (pair,
  metric) (Westfall & Young 1993, ch. 2; Romano & Wolf 2005, "Exact and approximate stepdown methods
  for multiple hypothesis testing", section 4). One-sided: deviations of the resamples above the
  estimate stand for those of the estimate above the truth. The quantile is the order statistic
  ceil((R + 1)(1 - alpha)) of R resamples, of the right level whatever R is (Davison & Hinkley 1997,
  section 4.2); of 1,000 at least 12 lie beyond it, with five rungs.
- Few images: the critical value is moved outwards by what a t quantile of as many images asks
  beyond a normal one (Hesterberg 2015, "What teachers should know about the bootstrap", section
  4.3), as all other intervals here are.
- Rungs: `ALPHA` is split evenly over the rungs at which anything is decided (Bonferroni).

FID takes no part (it is biased at small n, by an amount that depends on the point); KID stands for
it.

Dropping never takes away what a drop rests on. Where the point that beats is dropped itself, some
other at least as fast surely beats it in the same metric, and so the first point as well: the
differences add up, in quality and in speed, and the error of a sum is at most the sum of errors.
Estimates rise along such a chain, so that it ends at a point that is kept.

A pair without spread (equal images) decides nothing, and a metric that a point lacks (the dense
run's distance to itself) neither beats nor is beaten.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr, stdtrit

from dipgo_core.errors import EvaluationError
from dipgo_core.evaluation.intervals import Interval, Replicates, unpaired_ratio
from dipgo_core.evaluation.metrics import METRICS

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
#: Metric -> key of a candidate -> its replicates; candidates without the metric are left out.
Measured = Mapping[str, Mapping[str, Replicates]]

#: Chance that a race of all rungs drops any point that belongs on a front.
ALPHA = 0.05
#: A difference whose spread is below this share of its figures' spread has none: rounding errors.
_NO_SPREAD = 1e-9


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One evaluation in a race. speed: larger = faster, None = not known.

    speed_low, speed_high: ends of the 95 % interval of a measured speed; None = counted, exact.
    bars: evaluations that this one is compared with in the end; they go on as long as it does.
    protected: goes on whatever the figures say (the dense run).
    """

    key: str
    speed: float | None
    speed_low: float | None = None
    speed_high: float | None = None
    bars: tuple[str, ...] = ()
    protected: bool = False


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How a race ended. kept: in the order of the candidates.

    dropped: key -> metric -> key of a kept candidate that is at least as fast and surely better.
    critical: standard errors (of a mean of the images seen) by which a difference must exceed zero
    to be sure; None without pairs.
    """

    kept: tuple[str, ...]
    dropped: Mapping[str, Mapping[str, str]]
    critical: float | None


def raced_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """Return the metrics that a race can look at: all but FID."""
    return tuple(metric for metric in metrics if metric != "fid")


def alpha_of_rung(rungs: int) -> float:
    """Return the share of `ALPHA` that each decision gets; nothing is decided at the top rung."""
    return ALPHA / (rungs - 1)


def decide(
    candidates: Sequence[Candidate], measured: Measured, *, alpha: float, top: int
) -> Decision:
    """Return which candidates go on; see the module for what "surely" means.

    measured: of the same images and draws for every candidate and metric, resampled image by image.
    top: images at the top rung.

    Raises:
        EvaluationError: no metric to race on, or replicates that were not drawn alike.
    """
    if not measured:
        raise EvaluationError("a race needs a metric other than fid: add kid to evaluate.metrics")
    faster = _faster(candidates)
    everyone = tuple(candidate.key for candidate in candidates)
    if not all(measured.values()):  # nobody is beaten in a metric that nobody has
        return Decision(kept=everyone, dropped={}, critical=None)
    columns = {metric: _columns(metric, candidates, known) for metric, known in measured.items()}
    images = _images(measured)
    critical = _critical_value(columns, faster, alpha, images)
    if critical is None:
        return Decision(kept=everyone, dropped={}, critical=None)
    critical *= math.sqrt(1 - images / top)
    bounds = {metric: _lower_bounds(values, critical) for metric, values in columns.items()}
    beaten_by = {metric: np.where(faster, bound, -np.inf) for metric, bound in bounds.items()}
    beaten: list[Flags] = [np.any(lower > 0, axis=0) for lower in beaten_by.values()]
    kept = _kept(candidates, beaten)
    dropped = {
        one.key: {
            metric: candidates[_kept_winner(i, lower, kept)].key
            for metric, lower in beaten_by.items()
        }
        for i, one in enumerate(candidates)
        if not kept[i]
    }
    return Decision(
        kept=tuple(c.key for c, stays in zip(candidates, kept, strict=True) if stays),
        dropped=dropped,
        critical=critical,
    )


def _faster(candidates: Sequence[Candidate]) -> Flags:
    """faster[j, i]: candidate j is another one, and surely at least as fast as i.  # (P, P)"""
    flags = np.array([[_as_fast(j, i) for i in candidates] for j in candidates], dtype=np.bool_)
    np.fill_diagonal(flags, False)
    return flags


def _as_fast(a: Candidate, b: Candidate) -> bool:
    if a.speed is None or b.speed is None:
        return False
    mine, theirs = _measured_speed(a), _measured_speed(b)
    if mine is None or theirs is None:
        return a.speed >= b.speed
    return unpaired_ratio(mine, theirs).low >= 0


def _measured_speed(one: Candidate) -> Interval | None:
    if one.speed is None or one.speed_low is None or one.speed_high is None:
        return None
    return Interval(one.speed, one.speed_low, one.speed_high)


def _columns(
    metric: str, candidates: Sequence[Candidate], known: Mapping[str, Replicates]
) -> Floats:
    """Stack the replicates, larger = better; NaN where a candidate lacks the metric.

    # (1 + R, P)
    """
    lengths = {len(one.values) for one in known.values()}
    if len({(one.groups, one.n, one.method) for one in known.values()}) > 1 or len(lengths) > 1:
        raise EvaluationError(f"{metric} was not resampled alike for all points of a race")
    nothing = np.full(max(lengths), np.nan)
    sign = 1.0 if METRICS[metric].higher_is_better else -1.0
    return np.stack(
        [sign * known[c.key].values if c.key in known else nothing for c in candidates], axis=1
    )


def _images(measured: Measured) -> int:
    """Return how many images were measured."""
    return min(one.n for known in measured.values() for one in known.values())


def _critical_value(
    columns: Mapping[str, Floats], faster: Flags, alpha: float, images: int
) -> float | None:
    """Return the quantile of the largest studentised deviation; None where nothing has spread."""
    largest = np.float64(-np.inf)
    for values in columns.values():
        for i in np.flatnonzero(faster.any(axis=0)):
            deviations, errors = _deviations(values, int(i))
            wanted = faster[:, i] & (errors > 0)
            if wanted.any():
                studentised = deviations[:, wanted] / errors[wanted]
                largest = np.maximum(largest, studentised.max(axis=1))
    if np.ndim(largest) == 0 or images < 2:
        return None
    ordered = np.sort(np.atleast_1d(largest))
    rank = math.ceil((len(ordered) + 1) * (1 - alpha))
    if rank > len(ordered):
        raise EvaluationError(f"{len(ordered)} resamples are too few for a level of {alpha:g}")
    return _widened(float(ordered[rank - 1]), images)


def _widened(critical: float, images: int) -> float:
    """Return the critical value with the tail of a t distribution of as many images."""
    return math.sqrt(images / (images - 1)) * -float(stdtrit(images - 1, ndtr(-critical)))


def _deviations(values: Floats, i: int) -> tuple[Floats, Floats]:
    """Return what the resamples of every difference to candidate i deviate by, and their spread.

    The spread of a difference that never varies is 0.  # values (1 + R, P) -> (R, P), (P,)
    """
    drawn = values[1:] - values[1:, i : i + 1]
    deviations = drawn - drawn.mean(axis=0)
    errors = np.sqrt((deviations**2).mean(axis=0))
    scale = values[1:].std(axis=0) + np.abs(values[0]) * np.finfo(np.float64).eps
    known = errors > _NO_SPREAD * (scale + scale[i])  # False for NaN
    return deviations, np.where(known, errors, 0.0)


def _lower_bounds(values: Floats, critical: float) -> Floats:
    """bounds[j, i]: by how much j is better than i at least; -inf where that is not known.

    # values (1 + R, P) -> (P, P)
    """
    columns = []
    for i in range(values.shape[1]):
        _, errors = _deviations(values, i)
        bound = values[0] - values[0, i] - critical * errors
        columns.append(np.where(errors > 0, bound, -np.inf))
    return np.stack(columns, axis=1)


def _kept(candidates: Sequence[Candidate], beaten: Sequence[npt.NDArray[np.bool_]]) -> Flags:
    """Return who goes on: whoever is not beaten in every metric, the protected, and the bars."""
    protected = np.array([c.protected for c in candidates])
    stays = protected | ~np.array(beaten).all(axis=0)
    bars = {bar for c, goes_on in zip(candidates, stays, strict=True) if goes_on for bar in c.bars}
    kept: Flags = stays | np.array([c.key in bars for c in candidates])
    return kept


def _kept_winner(i: int, lower: Floats, kept: Flags) -> int:
    """Follow who surely beats candidate i, by the widest margin each time, to one that is kept.

    lower: bounds in one metric, -inf for slower ones.  # (P, P)
    """
    while not kept[i]:
        standing = np.where(kept & (lower[:, i] > 0), lower[:, i], -np.inf)
        i = int((standing if (standing > 0).any() else lower[:, i]).argmax())
    return i
