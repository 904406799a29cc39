"""What a sweep needs that is not in the repository: what of it is here, and fetching the rest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dipgo_core import hub
from dipgo_core.errors import HubError, ModelFilesError
from dipgo_core.model_files import check_weights
from orchestrator.hub_needs import HubNeed, hub_needs
from orchestrator.preflight import PublishedFile, published_files
from orchestrator.sweep_settings import SweepFile


@dataclass(frozen=True, kw_only=True)
class Stock:
    """One repository of the hub as a sweep needs it.

    files: path to bytes of what is read. absent, damaged: those of them that are not in the cache,
    or not whole. licence, gated, readable: None where the hub could not be asked; readable: the
    token given, or none, may fetch its files.
    """

    need: HubNeed
    commit: str
    files: Mapping[str, int]
    absent: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    licence: str | None = None
    gated: bool | None = None
    readable: bool | None = None

    @property
    def bytes(self) -> int:
        return sum(self.files.values())

    @property
    def bytes_to_fetch(self) -> int:
        return sum(self.files[name] for name in (*self.absent, *self.damaged))

    def to_json(self) -> dict[str, Any]:
        state = {**dict.fromkeys(self.absent, "absent"), **dict.fromkeys(self.damaged, "damaged")}
        return {
            "kind": self.need.kind,
            "id": self.need.id,
            "revision": self.need.revision,
            "commit": self.commit,
            "used_by": list(self.need.users),
            "files": [
                {"path": name, "bytes": size, "state": state.get(name, "cached")}
                for name, size in self.files.items()
            ],
            "bytes": self.bytes,
            "bytes_to_fetch": self.bytes_to_fetch,
            "licence": self.licence,
            "gated": self.gated,
            "readable": self.readable,
            "page": hub.page_of(self.need.id, self.need.repository),
        }


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Everything a sweep needs from outside. problems: what keeps it from being fetched."""

    stocks: tuple[Stock, ...]
    published: tuple[PublishedFile, ...]
    problems: tuple[str, ...]
    cache: Path
    free_bytes: int

    @property
    def bytes(self) -> int:
        return sum(stock.bytes for stock in self.stocks)

    @property
    def bytes_to_fetch(self) -> int:
        return sum(stock.bytes_to_fetch for stock in self.stocks)

    def to_json(self) -> dict[str, Any]:
        return {
            "hub": [stock.to_json() for stock in self.stocks],
            "elsewhere": [file.to_json() for file in self.published],
            "problems": list(self.problems),
            "bytes": self.bytes,
            "bytes_to_fetch": self.bytes_to_fetch,
            "free_bytes": self.free_bytes,
            "cache": str(self.cache),
            "token": hub.has_token(),
        }


def survey(sweep: SweepFile) -> Survey:
    """Look up what a sweep needs; the hub is asked for sizes, licences and gates where it can be.

    Nothing but a pipeline's model_index.json, which lists its parts, is fetched.
    """
    stocks: list[Stock] = []
    problems: list[str] = []
    for need in hub_needs(sweep):
        try:
            stock = stock_of(need)
            problems += [f"{need.place}: {line}" for line in _obstacles(stock)]
            stocks.append(stock)
        except HubError as error:
            problems.append(f"{need.place}: {error}")
    cache = hub.cache_folder()
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    missing = sum(stock.bytes_to_fetch for stock in stocks)
    if missing > free:
        problems.append(
            f"{missing / 1e9:.1f} GB are to be fetched into {cache}, {free / 1e9:.1f} GB are free "
            "there: make room, or set HF_HOME to another disk"
        )
    return Survey(
        stocks=tuple(stocks),
        published=published_files(sweep),
        problems=tuple(problems),
        cache=cache,
        free_bytes=free,
    )


def stock_of(need: HubNeed) -> Stock:
    """Look up one repository: its files at the commit of its revision, and which are here.

    Raises:
        HubError: neither the hub nor the cache knows it, or it has not what is needed of it.
    """
    commit = hub.resolve_commit(need.id, need.revision, need.repository)
    names = need.files(commit)
    sizes = hub.files_at(need.id, commit, need.repository) if names else {}
    if lacking := [name for name in names if name not in sizes]:
        raise HubError(f"{need.id} has no {hub.listed(lacking)} at commit {commit}")
    folder = hub.snapshot_folder(need.id, commit, need.repository)
    here = [name for name in names if (folder / name).is_file()]
    damaged = [name for name in here if not _is_whole(folder / name, sizes[name])]
    stock = Stock(
        need=need,
        commit=commit,
        files={name: sizes[name] for name in names},
        absent=tuple(name for name in names if name not in here),
        damaged=tuple(damaged),
    )
    return stock if hub.offline() else _with_terms(stock)


def fetch(survey: Survey) -> Iterator[tuple[Stock, Path]]:
    """Fetch what is not here, one repository after another; return each with its folder.

    Raises:
        HubError: something cannot be fetched; what was fetched stays, and is not fetched again.
    """
    for stock in survey.stocks:
        need = stock.need
        for name in stock.damaged:
            hub.fetch_again(need.id, stock.commit, name, need.repository)
        yield stock, hub.fetch(need.id, stock.commit, tuple(stock.files), need.repository)


def _is_whole(path: Path, size: int) -> bool:
    try:
        check_weights([path])
    except ModelFilesError:
        return False
    return path.stat().st_size == size


def _with_terms(stock: Stock) -> Stock:
    """Return the stock with licence and gate, as far as the hub answers."""
    need = stock.need
    try:
        found = hub.look_up(need.id, stock.commit, need.repository)
        readable = not found.gated or hub.may_read(need.id, need.repository)
    except HubError:
        return stock
    return replace(stock, licence=found.licence, gated=found.gated, readable=readable)


def _obstacles(stock: Stock) -> Iterator[str]:
    need = stock.need
    if not stock.bytes_to_fetch and not stock.absent:
        return
    names = hub.listed((*stock.absent, *stock.damaged))
    if stock.readable is False:
        yield hub.gated_message(need.id, need.repository)
    elif stock.readable is None:
        yield (
            f"{names} of {need.id} {'is' if len(stock.absent) == 1 else 'are'} not in the cache, "
            f"and the hub cannot be asked: copy {hub.cache_folder(need.id, need.repository)} from "
            "a machine that has it"
        )
