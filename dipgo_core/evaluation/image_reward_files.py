"""The files of ImageReward: its published weights and the vocabulary they read. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dipgo_core import hub
from dipgo_core.errors import HubError, ModelFilesError

WEIGHTS: Final = "ImageReward.pt"
VOCABULARY: Final = "vocab.txt"
#: ImageReward is published without the vocabulary of its text encoder, which is this model's.
VOCABULARY_ID: Final = "google-bert/bert-base-uncased"


@dataclass(frozen=True)
class RewardFiles:
    """Where ImageReward lies. name: with its commit, if it is from the hub."""

    name: str
    weights: Path
    vocabulary: Path


def hub_files(name: str) -> tuple[tuple[str, str | None, str], ...]:
    """Return (id, revision, file) of what `name` (``owner/name@revision``) needs from the hub."""
    hub_id, revision = hub.split_id(name)
    return (hub_id, revision, WEIGHTS), (VOCABULARY_ID, None, VOCABULARY)


def reward_folder(name: str) -> Path | None:
    """Return the folder that ImageReward was copied to, or None where `name` is a hub id.

    Raises:
        ModelFilesError: a folder was named, and it is missing or lacks files.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir() and not name.startswith((".", "/", "~")):
        return None
    lacking = [file for file in (WEIGHTS, VOCABULARY) if not (folder / file).is_file()]
    if lacking:
        raise ModelFilesError(
            f"no ImageReward in {folder}: {' and '.join(lacking)} missing; put {WEIGHTS} "
            f"({hub.page_of('THUDM/ImageReward')}, 1.8 GB) and {VOCABULARY} "
            f"({hub.page_of(VOCABULARY_ID)}, 0.2 MB) there, or give a hub id"
        )
    return folder


def reward_files(name: str) -> RewardFiles:
    """Return where the files lie, after fetching from the hub what is missing.

    Raises:
        ModelFilesError: files are missing, and the hub cannot be reached or does not have them.
    """
    folder = reward_folder(name)
    if folder is not None:
        return RewardFiles(name, folder / WEIGHTS, folder / VOCABULARY)
    if not hub.is_hub_id(hub.split_id(name)[0]):
        raise HubError(f"{name!r} is no folder here and no hub id (owner/name)")
    paths: list[Path] = []
    commits: list[str] = []
    for hub_id, revision, file in hub_files(name):
        commits.append(hub.resolve_commit(hub_id, revision))
        paths.append(hub.fetch(hub_id, commits[-1], [file]) / file)
    return RewardFiles(f"{hub.split_id(name)[0]}@{commits[0]}", *paths)
