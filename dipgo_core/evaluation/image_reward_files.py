"""The files of ImageReward: its published weights and the vocabulary they read. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dipgo_core import hub
from dipgo_core.errors import HubError, ModelFilesError
from dipgo_core.evaluation.tensor_names import check_tensors

WEIGHTS: Final = "ImageReward.pt"
VOCABULARY: Final = "vocab.txt"
#: ImageReward is published without the vocabulary of its text encoder, which is this model's.
VOCABULARY_ID: Final = "google-bert/bert-base-uncased"
#: Tensors that tell how wide and deep its parts are, and so are looked for before it is built.
_TENSORS: Final = (
    "blip.visual_encoder.patch_embed.proj.weight",
    "blip.visual_encoder.pos_embed",
    "blip.visual_encoder.blocks.0.mlp.fc1.weight",
    "blip.text_encoder.embeddings.word_embeddings.weight",
    "blip.text_encoder.embeddings.position_embeddings.weight",
    "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
    "blip.text_encoder.encoder.layer.0.intermediate.dense.weight",
    "mlp.layers.0.weight",
)
_SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class RewardFiles:
    """Where ImageReward lies. name: with its commits, if it is from the hub."""

    name: str
    weights: Path
    vocabulary: Path


def hub_files(name: str) -> tuple[tuple[str, str | None, str], ...]:
    """Return (id, revision, file) of what `name` needs from the hub: ``owner/name``,
    ``owner/name@revision``, or ``owner/name@revision+commit``, the last of the vocabulary."""
    hub_id, revision = hub.split_id(name)
    weights, plus, words = (revision or "").rpartition("+")
    if plus and hub.is_commit(words):
        return (hub_id, weights or None, WEIGHTS), (VOCABULARY_ID, words, VOCABULARY)
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


def check_reward(weights: Path) -> None:
    """Check that a file is an ImageReward, as far as the names of its tensors tell.

    Raises:
        ModelFilesError: it is torn, or another network.
    """
    check_tensors([weights], _TENSORS, "ImageReward")


def words_of(vocabulary: Path) -> list[str]:
    """Return the words of a vocabulary, in order of their numbers.

    Raises:
        ModelFilesError: it cannot be read, or is none of BERT's.
    """
    try:
        words = vocabulary.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ModelFilesError(f"{vocabulary} cannot be read: {error}") from error
    if lacking := [word for word in _SPECIAL if word not in words]:
        raise ModelFilesError(
            f"{vocabulary} has {len(words)} words without {lacking[0]}: it must be the vocabulary "
            f"of {VOCABULARY_ID}"
        )
    return words


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
    return RewardFiles(f"{hub.split_id(name)[0]}@{'+'.join(commits)}", *paths)
