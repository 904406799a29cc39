"""One batch of proposals: what to search next, by what is known so far (the only import of optuna).

Each task rebuilds its study from the results it is given, in their order, and draws with a seed of
its generation: proposals depend on nothing else. Sampler: TPE for several objectives (Ozaki et al.
2022), NSGA-II (Deb et al. 2002), or at random. Both objectives (MACs speed-up, quality) grow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.trial import Trial, TrialState

from orchestrator.task.work import Outcome, Work

Space = Mapping[str, BaseDistribution]
Over = Mapping[str, Mapping[str, Any]]
Params = dict[str, Any]

#: Digits of a proposed number: what a person reads, and writes into a sweep file, is what was run.
DIGITS = 6
#: How often a sampler is asked for something new; a small space may have nothing left.
TRIES = 20


def run_explore(work: Work) -> Outcome:
    """Propose the points of one generation."""
    inputs = work.task.inputs
    points = propose(inputs["explore"], work.task.options["generations"], int(inputs["count"]))
    return Outcome({"points": points})


def propose(
    asked: Mapping[str, Any], generations: Sequence[Sequence[Mapping[str, Any]]], count: int
) -> list[Params]:
    """Return `count` proposals.

    asked: sampler, seed, batch, and the dimensions (`orchestrator.explore.asked`). generations: the
    results so far, each ``{params, values}``; values of a failure are None.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    over = {name: asked["over"][name] for name in sorted(asked["over"])}
    space = {name: _distribution(dimension) for name, dimension in over.items()}
    sampler = _sampler(asked, _seed(int(asked["seed"]), len(generations)))
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    for results in generations:
        trials = [_replayed(study, space, over, each["params"]) for each in results]
        for trial, each in zip(trials, results, strict=True):
            _tell(study, trial, each["values"])
    known = [dict(each["params"]) for results in generations for each in results]
    for _ in range(count):
        known.append(_new(study, space, over, known))
    return known[len(known) - count :]


def _new(study: optuna.Study, space: Space, over: Over, known: Sequence[Params]) -> Params:
    """Return a proposal that is not known yet, if the sampler has one: crossing makes copies."""
    for _ in range(TRIES):
        trial = study.ask(dict(space))
        params = _params(trial, over)
        if params not in known:
            break
        study.tell(trial, state=TrialState.FAIL)
    return params


def _replayed(study: optuna.Study, space: Space, over: Over, params: Mapping[str, Any]) -> Trial:
    """Return a trial of an earlier proposal."""
    study.enqueue_trial({name: _inner(over[name], params[name]) for name in space})
    trial = study.ask(dict(space))
    if isinstance(study.sampler, NSGAIISampler):  # which generation it is of is noted by sampling
        _ = trial.relative_params
    return trial


def _tell(study: optuna.Study, trial: Trial, values: Sequence[float] | None) -> None:
    if values is None:
        study.tell(trial, state=TrialState.FAIL)
    else:
        study.tell(trial, list(values))


def _seed(seed: int, generation: int) -> int:
    """Return a seed of one generation: what was drawn for earlier ones is not drawn again."""
    return int(np.random.SeedSequence([seed, generation]).generate_state(1)[0])


def _sampler(asked: Mapping[str, Any], seed: int) -> BaseSampler:
    batch = int(asked["batch"])
    if asked["sampler"] == "tpe":
        return TPESampler(seed=seed, n_startup_trials=batch)
    if asked["sampler"] == "nsga2":
        return NSGAIISampler(seed=seed, population_size=batch)
    return RandomSampler(seed=seed)


def _distribution(dimension: Mapping[str, Any]) -> BaseDistribution:
    """Return Optuna's word for a dimension; choices go by their place in the list."""
    kind, low, high = dimension["kind"], dimension["low"], dimension["high"]
    if kind == "choice":
        return CategoricalDistribution(tuple(range(len(dimension["choices"]))))
    if kind in ("int", "logint"):
        return IntDistribution(int(low), int(high), log=kind == "logint")
    return FloatDistribution(float(low), float(high), log=kind == "loguniform")


def _inner(dimension: Mapping[str, Any], value: Any) -> Any:
    return list(dimension["choices"]).index(value) if dimension["kind"] == "choice" else value


def _params(trial: Trial, over: Over) -> Params:
    """Return a proposal as settings say it: choices by value, numbers with few digits."""
    return {name: _outer(over[name], value) for name, value in trial.params.items()}


def _outer(dimension: Mapping[str, Any], value: Any) -> Any:
    if dimension["kind"] == "choice":
        return dimension["choices"][value]
    if isinstance(value, int):
        return value
    rounded = float(f"{value:.{DIGITS}g}")
    return min(max(rounded, float(dimension["low"])), float(dimension["high"]))
