"""What a sweep takes along to a cluster: its file, and the local files it names, by digest."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dipgo_core.errors import ConfigError
from dipgo_core.families import find_known
from orchestrator.sweep_file import load_sweep
from orchestrator.sweep_file.context import Context
from orchestrator.sweep_file.overrides import apply_overrides
from orchestrator.sweep_issues import Issues
from orchestrator.sweep_settings import SweepFile
from orchestrator.yaml_source import Node, parse_yaml

#: Ray keeps what travels with a job in the memory of the head.
LARGEST_BYTES: Final = 256 * 2**20

SWEEP_FILE: Final = "sweep.yaml"

#: Sections whose texts are never files that travel.
_STAYS: Final = frozenset({"name", "storage", "tracking", "objective", "budget", "latency"})


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A local file or folder that goes along. field: of the sweep file; name: where it will lie."""

    field: str
    place: Path
    prefix: str
    size: int

    @property
    def name(self) -> str:
        return f"files/{_digest(self.place)[:16]}/{self.place.resolve().name}"

    @property
    def override(self) -> str:
        return f"{self.field}={json.dumps(self.prefix + self.name)}"


@dataclass(frozen=True, kw_only=True)
class Cargo:
    """A folder to send. overrides: to run `SWEEP_FILE` with there. digest: of all that decides."""

    folder: Path
    overrides: tuple[str, ...]
    digest: str


def pack(file: Path, overrides: Sequence[str], folder: Path) -> Cargo:
    """Copy a sweep file and what it names of this machine into `folder`, checked whole.

    Raises:
        SweepFileError: the sweep file has errors.
        ConfigError: its storage is a folder of this machine, or the files are too large to send.
    """
    sweep = load_sweep(file, overrides)
    _check_storage(sweep)
    staged = list(_local_files(file, overrides, sweep))
    _check_size(staged)
    shutil.copyfile(file, folder / SWEEP_FILE)
    for each in staged:
        _copy(each.place, folder / each.name)
    there = (*overrides, *(each.override for each in staged))
    content = hashlib.sha256(file.read_bytes())
    content.update(json.dumps(there).encode())
    return Cargo(folder=folder, overrides=there, digest=content.hexdigest())


def _check_storage(sweep: SweepFile) -> None:
    url = sweep.storage
    if "://" not in url and not Path(url).is_absolute():
        raise ConfigError(
            f"storage: {url} is relative to where a sweep runs, and a job's folder does not last; "
            "give one that all nodes see, such as -o storage=/mnt/shared/dipgo or "
            "-o storage=s3://bucket/dipgo"
        )


def _check_size(staged: Sequence[Staged]) -> None:
    if sum(each.size for each in staged) <= LARGEST_BYTES:
        return
    sizes = "\n".join(f"  {each.field}: {each.place}, {_mib(each.size)}" for each in staged)
    raise ConfigError(
        f"more than {_mib(LARGEST_BYTES)} cannot go along with a job:\n{sizes}\nPut them where all "
        "nodes see them and name that path with -o, or use a model of the hub"
    )


def _local_files(file: Path, overrides: Sequence[str], sweep: SweepFile) -> Iterator[Staged]:
    """Yield the files and folders of this machine that the sweep, as it was resolved, names."""
    issues = Issues()
    root = parse_yaml(file.read_bytes().decode("utf-8-sig"), source=str(file), issues=issues)
    assert root is not None  # load_sweep has read it
    resolved = json.dumps(sweep.to_json())
    context = Context(folder=file.parent)
    for node in _texts(apply_overrides(root, overrides, issues)):
        text = str(node.value)
        for prefix, path in (("", text), *_with_prefix(text)):
            place = None if find_known(path) else context.locate(path)
            if place is not None and json.dumps(prefix + place)[1:-1] in resolved:
                yield Staged(
                    field=node.path, place=Path(place), prefix=prefix, size=_size(Path(place))
                )
                break


def _with_prefix(text: str) -> Iterator[tuple[str, str]]:
    """Yield a scorer such as ``vgg:FILE`` as its prefix and its path."""
    kind, colon, path = text.partition(":")
    if colon and path:
        yield f"{kind}:", path


def _texts(node: Node) -> Iterator[Node]:
    if isinstance(node.value, str):
        if node.path.partition(".")[0] not in _STAYS and ("." in node.value or "/" in node.value):
            yield node
    elif isinstance(node.value, tuple):
        for each in node.value:
            yield from _texts(each)
    elif isinstance(node.value, Mapping):
        for each in node.value.values():
            yield from _texts(each)


def _files(place: Path) -> list[Path]:
    return (
        sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    )


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in _files(place))


def _digest(place: Path) -> str:
    """Return a SHA-256 of a file, or of a folder's names and contents."""
    whole = hashlib.sha256()
    for path in _files(place):
        with path.open("rb") as opened:
            content = hashlib.file_digest(opened, "sha256").hexdigest()
        whole.update(f"{path.relative_to(place).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def _copy(place: Path, goal: Path) -> None:
    goal.parent.mkdir(parents=True, exist_ok=True)
    if place.is_dir():
        shutil.copytree(place, goal, dirs_exist_ok=True)
    else:
        shutil.copyfile(place, goal)


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
