"""The model hub: commits, files, what the local cache holds. Only import of huggingface_hub.

What needs no network imports next to nothing: the library's client loads when the hub is asked.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from huggingface_hub import constants

from dipgo_core.errors import DipgoError, HubError, HubUnreachableError

if TYPE_CHECKING:
    from huggingface_hub import DatasetInfo, HfApi, ModelInfo

Kind = Literal["model", "dataset"]

MAIN: Final = "main"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One repository at one commit. files: path to size in bytes; licence as its card says."""

    id: str
    kind: Kind
    commit: str
    files: Mapping[str, int]
    licence: str | None = None
    gated: bool = False


def is_commit(revision: str | None) -> bool:
    """Return whether a revision is a commit: 40 hexadecimal digits, which never move."""
    return _COMMIT.fullmatch(revision or "") is not None


def is_hub_id(name: str) -> bool:
    """Return whether a name has the form of a repository on the hub: owner/name."""
    return _ID.fullmatch(name) is not None


def split_id(name: str) -> tuple[str, str | None]:
    """Return id and revision of ``owner/name@revision``; None where no revision is written."""
    hub_id, _, revision = name.partition("@")
    return hub_id, revision or None


def offline() -> bool:
    """Return whether HF_HUB_OFFLINE keeps this process from asking the hub."""
    return constants.is_offline_mode()


def has_token() -> bool:
    """Return whether HF_TOKEN, or the token that a login saved, is there."""
    from huggingface_hub import get_token

    return get_token() is not None


def cache_folder(hub_id: str | None = None, kind: Kind = "model") -> Path:
    """Return the folder of the local cache, or that of one repository in it."""
    root = Path(constants.HF_HUB_CACHE).expanduser()
    return root if hub_id is None else root / f"{kind}s--{hub_id.replace('/', '--')}"


def snapshot_folder(hub_id: str, commit: str, kind: Kind = "model") -> Path:
    """Return where the cache keeps the files of one commit, there or not."""
    return cache_folder(hub_id, kind) / "snapshots" / commit


def page_of(hub_id: str, kind: Kind = "model") -> str:
    """Return the address of a repository's page."""
    return f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{hub_id}"


def resolve_commit(hub_id: str, revision: str | None = None, kind: Kind = "model") -> str:
    """Return the commit that a branch or tag is now; where the hub is out of reach, the one that
    it was when the cache last saw it.

    Raises:
        HubError: there is no such repository or revision, or it may not be read.
        HubUnreachableError: the hub is out of reach, and the cache never saw the revision.
    """
    if revision is not None and is_commit(revision):
        return revision
    with _told(hub_id, kind, f"revision {revision or MAIN} of {hub_id}"):
        found = _api().resolve_revision(
            hub_id, repo_type=kind, revision=revision, cache_dir=cache_folder()
        )
    return str(found.resolved)


def cached_commit(hub_id: str, revision: str | None = None, kind: Kind = "model") -> str | None:
    """Return the commit that a revision was when the local cache last saw it; asks nobody."""
    if revision is not None and is_commit(revision):
        return revision
    try:
        noted = (cache_folder(hub_id, kind) / "refs" / (revision or MAIN)).read_text().strip()
    except OSError:
        return None
    return noted if is_commit(noted) else None


def look_up(hub_id: str, commit: str, kind: Kind = "model") -> Repository:
    """Ask the hub what a repository is at one commit.

    Raises:
        HubError: the hub is out of reach, or has no such repository or commit.
    """
    from huggingface_hub import DatasetInfo, ModelInfo

    with _told(hub_id, kind, hub_id):
        info = _api().repo_info(
            hub_id, repo_type=kind, revision=commit, files_metadata=True, timeout=_TIMEOUT_S
        )
    assert isinstance(info, ModelInfo | DatasetInfo)  # of no other kind was asked
    return Repository(
        id=hub_id,
        kind=kind,
        commit=info.sha or commit,
        files={file.rfilename: file.size or 0 for file in info.siblings or ()},
        licence=_licence(info),
        gated=bool(info.gated),
    )


def check_access(hub_id: str, kind: Kind = "model") -> None:
    """Ask the hub whether the token given (or none) may fetch the files of a repository.

    Raises:
        HubError: it may not, or the hub is out of reach.
    """
    with _told(hub_id, kind, hub_id):
        _api().auth_check(hub_id, repo_type=kind)


def may_read(hub_id: str, kind: Kind = "model") -> bool:
    """Ask the hub whether the token given (or none) may fetch the files of a repository.

    Raises:
        HubUnreachableError: the hub is out of reach.
    """
    try:
        check_access(hub_id, kind)
    except HubUnreachableError:
        raise
    except HubError:
        return False
    return True


def files_at(hub_id: str, commit: str, kind: Kind = "model") -> Mapping[str, int]:
    """Return path and size of every file of a commit: as the cache noted them, else from the hub,
    else those that lie in the cache.

    Raises:
        HubError: neither knows the commit.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(
            hub_id, repo_type=kind, revision=commit, cache_dir=cache_folder()
        )
        return {file.path: file.size for file in tree}
    except CachedRepoTreeNotFoundError:
        pass
    try:
        return look_up(hub_id, commit, kind).files
    except HubUnreachableError:
        cached = cached_files(hub_id, commit, kind)
        if not cached:
            raise
        return cached


def cached_files(hub_id: str, commit: str, kind: Kind = "model") -> dict[str, int]:
    """Return path and size of the files of a commit that lie in the local cache."""
    folder = snapshot_folder(hub_id, commit, kind)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def fetch(hub_id: str, commit: str, paths: Sequence[str], kind: Kind = "model") -> Path:
    """Fetch the files that the cache lacks, and return the folder that holds them all.

    Nothing is asked of the hub when all are there.

    Raises:
        HubError: a file cannot be fetched; says which are missing and where to copy them.
    """
    folder = snapshot_folder(hub_id, commit, kind)
    missing = _absent(folder, paths)
    if missing:
        what = f"{hub_id} at {commit[:12]} lacks {listed(missing)} in {folder}, which"
        with _told(hub_id, kind, what):
            _api().snapshot_download(
                hub_id,
                repo_type=kind,
                revision=commit,
                cache_dir=cache_folder(),
                allow_patterns=[glob.escape(path) for path in missing],
            )
    if missing := _absent(folder, paths):
        raise HubError(f"{hub_id} has no {listed(missing)} at commit {commit}; choose another")
    return folder


def fetch_again(hub_id: str, commit: str, path: str, kind: Kind = "model") -> None:
    """Fetch a file that lies damaged in the cache.

    Raises:
        HubError: it cannot be fetched.
    """
    with _told(hub_id, kind, f"{path} of {hub_id}"):
        _api().hf_hub_download(
            hub_id,
            path,
            repo_type=kind,
            revision=commit,
            cache_dir=cache_folder(),
            force_download=True,
        )


def upload(hub_id: str, files: Mapping[str, bytes], *, message: str, private: bool = False) -> str:
    """Commit files to a model repository, made if need be; return the commit.

    Raises:
        HubError: the token given may not write there.
        HubUnreachableError: the hub is out of reach.
    """
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    try:
        with _told(hub_id, "model", hub_id):
            api = _api()
            api.create_repo(hub_id, private=private, exist_ok=True)
            return str(api.create_commit(hub_id, operations, commit_message=message).oid)
    except HubUnreachableError as error:
        raise HubUnreachableError(
            f"{listed(files)} cannot be written to {page_of(hub_id)} ({_reason(error)}): try again "
            "with network"
        ) from error


def gated_message(hub_id: str, kind: Kind = "model") -> str:
    """Return what to do about a repository that the token given, or none, may not read."""
    token = "one is set, and has no access" if has_token() else "none is set"
    return (
        f"{hub_id} is gated: accept its terms at {page_of(hub_id, kind)}, then set HF_TOKEN to a "
        f"token of that account ({token})"
    )


def listed(names: Iterable[str], most: int = 4) -> str:
    """Return names for a message, the first few written out."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _absent(folder: Path, paths: Sequence[str]) -> list[str]:
    return [path for path in paths if not (folder / path).is_file()]


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(endpoint=constants.ENDPOINT, library_name="dipgo-sweep")


def _licence(info: ModelInfo | DatasetInfo) -> str | None:
    card = info.card_data
    licence = None if card is None else card.get("license")
    if isinstance(licence, list):
        return ", ".join(map(str, licence))
    return None if licence is None else str(licence)


@contextmanager
def _told(hub_id: str, kind: Kind, what: str) -> Iterator[None]:
    """Turn what the library raises (of many kinds, network ones among them) into a HubError."""
    try:
        yield
    except DipgoError:
        raise
    except Exception as error:
        raise _hub_error(error, hub_id, kind, what) from error


def _hub_error(error: Exception, hub_id: str, kind: Kind, what: str) -> HubError:
    from huggingface_hub import errors

    page = page_of(hub_id, kind)
    if isinstance(error, errors.GatedRepoError):
        return HubError(gated_message(hub_id, kind))
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{what} does not exist; {page}/commits/main lists what there is")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"the hub has no {kind} {hub_id}, or it is private: check the id at {page}, or set "
            "HF_TOKEN to a token that may read it"
        )
    if isinstance(error, errors.HFValidationError):
        return HubError(f"{hub_id!r} is no hub id: {_reason(error)}")
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in (401, 403):
        return HubError(
            f"the hub refuses access to {hub_id} ({_reason(error)}): set HF_TOKEN to a token that "
            "may read it and, to upload, write to it"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return HubError(f"{what} is not in the repository: {_reason(error)}")
    unseen = isinstance(error, errors.RevisionResolutionError)
    return HubUnreachableError(
        f"{what} cannot be read from the hub ({_reason(error)})"
        f"{', and the cache here never saw it' if unseen else ''}: fetch it with network "
        f"(`dipgo-sweep prefetch`), copy {cache_folder(hub_id, kind)} from a machine that has it, "
        "or name a local folder or file instead"
    )


def _reason(error: Exception) -> str:
    if offline():
        return "HF_HUB_OFFLINE is set"
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line for line in str(root).splitlines() if line.strip()]
    return f"{type(root).__name__}: {lines[0] if lines else 'no reason given'}"
