"""Before a sweep spends anything: what it needs is there and fits, or one error lists why not."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dipgo_core import hub
from dipgo_core.errors import DipgoError
from dipgo_core.evaluation.image_reward_files import WEIGHTS, check_reward
from dipgo_core.evaluation.inception_files import INCEPTION, inception_file
from dipgo_core.evaluation.lpips_files import BACKBONES, checked_backbone
from dipgo_core.evaluation.scorers import MODEL_TYPES, check_inputs, model_type_of
from dipgo_core.model_files import NETWORK_CONFIGS, check_weights
from orchestrator.facts import ModelFacts, find_facts, refusal, scorer_names
from orchestrator.hub_needs import (
    Commits,
    HubNeed,
    cached_commits,
    hub_needs,
    place_of,
    resolve_needs,
    with_commits,
)
from orchestrator.model_places import Configs, config_places
from orchestrator.sweep_settings import SweepFile, SweepModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A sweep that can be run. sweep: every hub revision a commit; commits: what they were."""

    sweep: SweepFile
    facts: Mapping[str, ModelFacts]
    commits: Commits


def prepare(sweep: SweepFile, *, last: Mapping[str, Any] | None = None) -> Ready:
    """Resolve revisions, gather facts, and check that nothing is missing that will be loaded.

    last: what the last run noted; a branch that moved since is told.

    Raises:
        PreflightError: something is missing, damaged or does not fit; lists all of it.
    """
    needs = hub_needs(sweep)
    commits, problems = resolve_needs(needs)
    _warn_of_moves(needs, commits, (last or {}).get("commits", {}))
    resolved = with_commits(sweep, commits)
    problems += [line for need in needs for line in _absent(need, commits)]
    if not problems:
        problems += [line for model in resolved.models for line in _configs(model)]
    facts, unfit = find_facts(resolved, offline=bool(problems))
    problems += unfit
    problems += [
        f"{place_of(file.users)}: {file.problem}"
        for file in published_files(sweep)
        if file.problem is not None
    ]
    if problems:
        raise refusal(sweep, problems)
    for remark in remarks_on_items(resolved, facts):
        logger.warning("%s", remark)
    noted = {need.key: commits[need.key] for need in needs}
    return Ready(sweep=resolved, facts=facts, commits=noted)


def as_last_run(
    sweep: SweepFile, last: Mapping[str, Any]
) -> tuple[SweepFile, Mapping[str, ModelFacts]]:
    """Return sweep and facts as the last run had them, or as the hub's cache has, without network.

    Raises:
        PreflightError: prompts, weights, scorers or statistics are missing or do not fit.
    """
    needs = hub_needs(sweep)
    resolved = with_commits(sweep, {**cached_commits(needs), **last.get("commits", {})})
    facts, problems = find_facts(resolved, offline=True, known=last.get("items"))
    if problems:
        raise refusal(sweep, problems)
    return resolved, facts


def _warn_of_moves(needs: Sequence[HubNeed], commits: Commits, before: Commits) -> None:
    for need in needs:
        old, new = before.get(need.key), commits.get(need.key)
        if old and new and old != new:
            logger.warning(
                "%s of %s moved from %s to %s since the last run: what depends on it (%s) is "
                "computed again; `dipgo-sweep pin` keeps it where it is",
                need.revision or hub.MAIN,
                need.id,
                old[:12],
                new[:12],
                need.place,
            )


def _absent(need: HubNeed, commits: Commits) -> list[str]:
    """Return why what a need stands for cannot be loaded, if it is known by now."""
    commit = commits.get(need.key)
    if commit is None:
        return []
    return _failure(need.place, lambda: _check_need(need, commit))


def _configs(model: SweepModel) -> list[str]:
    """Fetch what facts of a hub model are read from; return why that fails."""
    return [
        line
        for configs in config_places(model).all
        if configs.on_hub and hub.is_commit(configs.settings.revision)
        for line in _failure(f"{model.name}: {configs.field}", partial(_fetch, configs))
    ]


def _fetch(configs: Configs) -> None:
    hub.fetch(configs.settings.id, str(configs.settings.revision), configs.files)


def _check_need(need: HubNeed, commit: str) -> None:
    files = need.files(commit)
    folder = hub.snapshot_folder(need.id, commit, need.repository)
    present = [name for name in files if (folder / name).is_file()]
    check_weights(folder / name for name in present)
    if len(present) < len(files):
        if hub.offline():
            hub.fetch(need.id, commit, files, need.repository)  # says what is missing
        hub.check_access(need.id, need.repository)
    if need.role is not None and need.role in MODEL_TYPES:
        hub.fetch(need.id, commit, [name for name in files if name in NETWORK_CONFIGS])
        kind = model_type_of(need.role, folder)
        check_inputs(need.role, kind, files, f"{need.id} at {commit[:12]}")
    if need.role == "image_reward" and WEIGHTS in present:
        check_reward(folder / WEIGHTS)


@dataclass(frozen=True, kw_only=True)
class PublishedFile:
    """A scorer's weights that are published as a file, not on the hub, and put in place by hand.

    problem: why it cannot be used, with its address, size and place; None if it is there.
    """

    scorer: str
    users: tuple[str, ...]
    path: str | None
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def published_files(sweep: SweepFile) -> tuple[PublishedFile, ...]:
    """Return the published files that the scorers of a sweep need, here or not."""
    users: dict[tuple[str, Callable[[str], Path]], list[str]] = {}
    for model in sweep.models:
        for role, name in scorer_names(model).items():
            find = _PUBLISHED.get(name.partition(":")[0])
            if find is not None:
                place = f"{model.name}: evaluate.scorers.{role}"
                users.setdefault((name, find), []).append(place)
    return tuple(_published(name, find, tuple(who)) for (name, find), who in users.items())


def _published(name: str, find: Callable[[str], Path], users: tuple[str, ...]) -> PublishedFile:
    try:
        path = str(find(name))
    except DipgoError as error:
        return PublishedFile(scorer=name, users=users, path=None, problem=str(error))
    return PublishedFile(scorer=name, users=users, path=path, problem=None)


#: How the file of a scorer is found and checked, by the first word of its name.
_PUBLISHED: Mapping[str, Callable[[str], Path]] = {
    INCEPTION: inception_file,
    **dict.fromkeys(BACKBONES, checked_backbone),
}


def remarks_on_items(sweep: SweepFile, facts: Mapping[str, ModelFacts]) -> list[str]:
    """Return a line for each prompt set that is smaller than it looks: items that repeat others,
    and calibration sets that have to be shown more than once."""
    users: dict[str, list[str]] = {}
    for model in sweep.models:
        if model.name in facts:
            for remark in _remarks(model, facts[model.name]):
                users.setdefault(remark, []).append(model.name)
    return [f"{', '.join(names)}: {remark}" for remark, names in users.items()]


def _remarks(model: SweepModel, facts: ModelFacts) -> Iterator[str]:
    test, calibration = "evaluate.prompts", "search.calibration.prompts"
    for field_name, items in ((test, facts.test), (calibration, facts.calibration)):
        if items.repeated:
            yield (
                f"{field_name}: {items.repeated} of {items.count + items.repeated} items repeat "
                f"an earlier one and are left out, {items.count} are used"
            )
    images, count = model.calibration.images, facts.calibration.count
    if facts.calibration.items is not None and images > count:
        yield (
            f"{calibration}: {count} items for {images} calibration images, each is shown up to "
            f"{-(-images // count)} times with other noise: searches and choices of baselines see "
            f"{count} independent ones"
        )


def not_here(sweep: SweepFile) -> list[str]:
    """Return a line for each thing that this machine would have to fetch, or be given, to run."""
    lines = [f"{need.place}: {need.id}" for need in hub_needs(sweep) if not need.is_here()]
    files = (file for file in published_files(sweep) if file.problem is not None)
    return lines + [f"{place_of(file.users)}: {file.problem}" for file in files]


def _failure(place: str, check: Callable[[], object]) -> list[str]:
    try:
        check()
    except DipgoError as error:
        return [f"{place}: {error}"]
    return []
