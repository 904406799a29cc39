"""What a sweep takes from the model hub, and the sweep with commits for revisions. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dipgo_core import hub
from dipgo_core.config import ModelSettings
from dipgo_core.errors import HubError
from dipgo_core.evaluation.image_reward_files import hub_files
from dipgo_core.evaluation.metrics import Role
from dipgo_core.evaluation.scorers import hub_revisions, hub_scorer
from dipgo_core.families import Scorers
from dipgo_core.model_base import Elsewhere, base_of, elsewhere, model_folder, single_file
from dipgo_core.model_files import (
    hub_network_files,
    hub_pipeline_files,
    model_index,
    network_files,
    pipeline_files,
    without,
)
from orchestrator.facts import scorer_names
from orchestrator.sweep_settings import PromptSource, SweepFile, SweepModel

NeedKind = Literal["model", "denoiser", "scorer", "prompts", "vocabulary"]


@dataclass(frozen=True, kw_only=True)
class HubNeed:
    """One repository that a sweep needs. users: ``model: field``, each place that asks for it.

    role: of a scorer. file: the one file of a prompt set; None: the package datasets reads it.
    elsewhere: what of a model's base comes from elsewhere.
    """

    kind: NeedKind
    id: str
    revision: str | None
    role: Role | None = None
    file: str | None = None
    elsewhere: Elsewhere | None = None
    users: tuple[str, ...] = ()

    @property
    def repository(self) -> hub.Kind:
        return "dataset" if self.kind == "prompts" else "model"

    @property
    def place(self) -> str:
        """Who asks for it, as a message begins: ``sd15, sdxl: evaluate.scorers.clip``."""
        return place_of(self.users)

    @property
    def key(self) -> str:
        """What tells one revision of one repository from another."""
        return revision_key(self.id, self.revision, self.repository)

    @property
    def pinned(self) -> bool:
        return hub.is_commit(self.revision)

    def files(self, commit: str) -> tuple[str, ...]:
        """Return the files that are read of it; () for prompts that `datasets` reads.

        Raises:
            HubError: the repository cannot be read, or lacks what is needed of it.
        """
        if self.kind == "model":
            return hub_pipeline_files(self.id, commit, self.elsewhere).loaded
        if self.kind == "denoiser" or (self.kind == "scorer" and self.role != "image_reward"):
            return hub_network_files(self.id, commit).loaded
        return () if self.file is None else (self.file,)

    def is_here(self) -> bool:
        """Return whether the local cache holds all that is read of it; asks nobody. Prompts that
        the package datasets reads count as here."""
        commit = hub.cached_commit(self.id, self.revision, self.repository)
        names = set(hub.cached_files(self.id, commit, self.repository)) if commit else set()
        if self.kind == "prompts" and self.file is None:
            return True
        if self.file is not None:
            return self.file in names
        if self.kind in ("scorer", "denoiser"):
            folder = hub.snapshot_folder(self.id, commit or "")
            return not network_files(names, folder).missing
        if commit is None or "model_index.json" not in names:
            return False
        index = model_index(hub.snapshot_folder(self.id, commit))
        return not without(pipeline_files(index, names), self.elsewhere).missing


#: Revisions and what they resolve to, by `revision_key`.
Commits = Mapping[str, str]


def revision_key(hub_id: str, revision: str | None, kind: hub.Kind) -> str:
    """Return ``model:owner/name@revision``."""
    return f"{kind}:{hub_id}@{revision or hub.MAIN}"


def place_of(users: Sequence[str]) -> str:
    """Return ``model: field`` texts as one, the models of a field together."""
    models: dict[str, list[str]] = {}
    for user in users:
        model, _, field = user.partition(": ")
        models.setdefault(field, []).append(model)
    return ", ".join(f"{', '.join(names)}: {field}" for field, names in models.items())


def hub_needs(sweep: SweepFile) -> tuple[HubNeed, ...]:
    """Return everything that a sweep takes from the hub, each once, with all who need it."""
    found: dict[HubNeed, list[str]] = {}
    for model in sweep.models:
        for field, need in _needs_of(model):
            found.setdefault(need, []).append(f"{model.name}: {field}")
    return tuple(replace(need, users=tuple(users)) for need, users in found.items())


def _needs_of(model: SweepModel) -> Iterator[tuple[str, HubNeed]]:
    settings, base = model.settings, base_of(model.settings)
    if single_file(settings.id) is None and model_folder(settings.id) is None:
        kind: NeedKind = "model" if base is None else "denoiser"
        yield "id", HubNeed(kind=kind, id=settings.id, revision=settings.revision)
    if base is not None and model_folder(base.id) is None:
        part = elsewhere(settings)
        yield "base", HubNeed(kind="model", id=base.id, revision=base.revision, elsewhere=part)
    for role, name in scorer_names(model).items():
        if hub_scorer(name):
            yield from _scorer_needs(role, name)
    for field, source in (
        ("evaluate.prompts", model.evaluate.prompts),
        ("search.calibration.prompts", model.calibration.prompts),
    ):
        if source.kind == "hub":
            yield (
                field,
                HubNeed(
                    kind="prompts", id=source.value, revision=source.revision, file=source.file
                ),
            )


def _scorer_needs(role: Role, name: str) -> Iterator[tuple[str, HubNeed]]:
    field = f"evaluate.scorers.{role}"
    if role != "image_reward":
        hub_id, revision = hub.split_id(name)
        yield field, HubNeed(kind="scorer", id=hub_id, revision=revision, role=role)
        return
    (hub_id, revision, weights), (words_id, words_revision, words) = hub_files(name)
    yield field, HubNeed(kind="scorer", id=hub_id, revision=revision, role=role, file=weights)
    yield field, HubNeed(kind="vocabulary", id=words_id, revision=words_revision, file=words)


def resolve_needs(needs: Sequence[HubNeed]) -> tuple[dict[str, str], list[str]]:
    """Return the commit of each need by its key, and a line for each that has none."""
    commits: dict[str, str] = {}
    problems: list[str] = []
    for need in needs:
        try:
            commits[need.key] = hub.resolve_commit(need.id, need.revision, need.repository)
        except HubError as error:
            problems.append(f"{need.place}: {error}")
    return commits, problems


def cached_commits(needs: Sequence[HubNeed]) -> dict[str, str]:
    """Return the commits that the hub's local cache knows, without asking the hub."""
    found = {need.key: hub.cached_commit(need.id, need.revision, need.repository) for need in needs}
    return {key: commit for key, commit in found.items() if commit is not None}


def with_commits(sweep: SweepFile, commits: Commits) -> SweepFile:
    """Return the sweep with each revision that has a commit written as that commit."""
    return replace(sweep, models=tuple(_pinned(model, commits) for model in sweep.models))


def _pinned(model: SweepModel, commits: Commits) -> SweepModel:
    settings = model.settings
    commit = commits.get(revision_key(settings.id, settings.revision, "model"))
    base = pinned_base(settings, commits)
    evaluate = replace(
        model.evaluate,
        scorers=_pinned_scorers(model, commits),
        prompts=_pinned_prompts(model.evaluate.prompts, commits),
    )
    calibration = replace(
        model.calibration, prompts=_pinned_prompts(model.calibration.prompts, commits)
    )
    return replace(
        model,
        settings=replace(settings, revision=commit or settings.revision, base=base),
        evaluate=evaluate,
        calibration=calibration,
    )


def pinned_base(settings: ModelSettings, commits: Commits) -> str | None:
    """Return a model's base as a sweep file writes it, with its commit if that is known."""
    base = base_of(settings)
    if base is None:
        return settings.base
    commit = commits.get(revision_key(base.id, base.revision, "model"))
    return f"{base.id}@{commit}" if commit else settings.base


def _pinned_scorers(model: SweepModel, commits: Commits) -> Scorers:
    pinned = {
        role: pinned_scorer(role, name, commits) for role, name in scorer_names(model).items()
    }
    return replace(model.evaluate.scorers, **{str(role): name for role, name in pinned.items()})


def pinned_scorer(role: Role, name: str, commits: Commits) -> str:
    """Return a scorer's name with the commit of each repository it is read from; as it is, if it is
    from no hub, or not all of them are known."""
    if not hub_scorer(name):
        return name
    found: list[str] = []
    for hub_id, revision in hub_revisions(role, name):
        commit = commits.get(revision_key(hub_id, revision, "model"))
        if commit is None and not hub.is_commit(revision):
            return name
        found.append(commit or str(revision))
    return f"{hub.split_id(name)[0]}@{'+'.join(found)}"


def _pinned_prompts(source: PromptSource, commits: Commits) -> PromptSource:
    commit = commits.get(revision_key(source.value, source.revision, "dataset"))
    return replace(source, revision=commit) if source.kind == "hub" and commit else source
