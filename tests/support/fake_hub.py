"""A model hub on loopback that speaks as much of the hub's protocol as huggingface_hub asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_reader"
_API = re.compile(
    r"/api/(models|datasets)/([^/]+/[^/]+)"
    r"(?:/(revision|tree|auth-check|paths-info|preupload|commit)(?:/([^/]+)(?:/(.+))?)?)?"
)
_CREATE = "/api/repos/create"
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repo:
    """One repository: its commits, each a set of files, and what `main` is now."""

    id: str
    kind: str
    gated: bool
    licence: str
    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    main: str = ""

    def files(self, revision: str) -> tuple[str, Mapping[str, bytes]] | None:
        commit = self.main if revision == "main" else revision
        return (commit, self.commits[commit]) if commit in self.commits else None


class FakeHub:
    """Repositories served over HTTP. downloads: how often each file was sent, by ``id/path``."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.downloads: Counter[str] = Counter()
        self.requests = 0
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def put(
        self,
        repo_id: str,
        files: Mapping[str, bytes],
        *,
        kind: str = "model",
        gated: bool = False,
        licence: str = "mit",
    ) -> str:
        """Commit `files` to a repository's main, made if need be; return the commit."""
        repo = self.repos.setdefault((kind, repo_id), Repo(repo_id, kind, gated, licence))
        text = json.dumps([repo_id, len(repo.commits)])
        repo.main = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        repo.commits[repo.main] = dict(files)
        return repo.main

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    served: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_POST(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *args: Any) -> None:
        """Keep quiet."""

    def _answer(self, *, with_body: bool) -> None:
        self.served.requests += 1
        path = unquote(urlsplit(self.path).path)
        if path == _CREATE:
            self._create()
        elif match := _API.fullmatch(path):
            self._api(match, with_body)
        elif match := _FILE.fullmatch(path):
            self._file(match, with_body)
        else:
            self._refuse("EntryNotFound")

    def _api(self, match: re.Match[str], with_body: bool) -> None:
        kind, repo_id, what, revision, folder = match.groups()
        repo = self.served.repos.get((kind.removesuffix("s"), repo_id))
        found = None if repo is None else repo.files(revision or "main")
        if repo is None:
            self._refuse("RepoNotFound")
        elif found is None:
            self._refuse("RevisionNotFound")
        elif what == "preupload":
            files = [
                {**file, "uploadMode": "regular", "shouldIgnore": False}
                for file in self._body()["files"]
            ]
            self._json({"files": files}, with_body)
        elif what == "commit":
            self._commit(repo, found[1])
        elif what == "auth-check":
            self._json({}, with_body) if self._allowed(repo) else self._refuse("GatedRepo", 403)
        elif what in ("tree", "paths-info"):
            asked = self._asked_paths() if what == "paths-info" else None
            self._tree(found[1], asked, folder)
        else:
            self._json(_info(repo, *found), with_body)

    def _tree(
        self, files: Mapping[str, bytes], asked: list[str] | None, folder: str | None
    ) -> None:
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in files.items()
            if (asked is None or name in asked) and name.startswith(f"{folder}/" if folder else "")
        ]
        if folder and not rows:
            self._refuse("EntryNotFound")
        else:
            self._json(rows, with_body=True)

    def _create(self) -> None:
        asked = self._body()
        repo_id = (
            f"{asked['organization']}/{asked['name']}" if "organization" in asked else asked["name"]
        )
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._refuse("", 401)
        elif ("model", repo_id) in self.served.repos:
            self._json({"url": f"{self.served.url}/{repo_id}"}, with_body=True, status=409)
        else:
            self.served.put(repo_id, {})
            self._json({"url": f"{self.served.url}/{repo_id}"}, with_body=True)

    def _commit(self, repo: Repo, files: Mapping[str, bytes]) -> None:
        lines = [json.loads(line) for line in self._text().splitlines()]
        sent = [line["value"] for line in lines if line["key"] == "file"]
        new = {file["path"]: base64.b64decode(file["content"]) for file in sent}
        commit = self.served.put(repo.id, {**files, **new})
        url = f"{self.served.url}/{repo.id}/commit/{commit}"
        self._json({"commitUrl": url, "commitOid": commit, "success": True}, with_body=True)

    def _asked_paths(self) -> list[str]:
        return list(self._body()["paths"])

    def _body(self) -> dict[str, Any]:
        return dict(json.loads(self._text()))

    def _text(self) -> str:
        return self.rfile.read(int(self.headers["Content-Length"])).decode()

    def _file(self, match: re.Match[str], with_body: bool) -> None:
        dataset, repo_id, revision, name = match.groups()
        repo = self.served.repos.get(("dataset" if dataset else "model", repo_id))
        found = None if repo is None else repo.files(revision)
        if repo is None or found is None:
            self._refuse("RepoNotFound" if repo is None else "RevisionNotFound")
        elif not self._allowed(repo):
            self._refuse("GatedRepo", 403)
        elif name not in found[1]:
            self._refuse("EntryNotFound", headers={"X-Repo-Commit": found[0]})
        else:
            data = found[1][name]
            if with_body:
                self.served.downloads[f"{repo_id}/{name}"] += 1
            headers = {"X-Repo-Commit": found[0], "ETag": f'"{_etag(data)}"'}
            self._send(200, data, with_body, headers)

    def _allowed(self, repo: Repo) -> bool:
        return not repo.gated or self.headers.get("authorization") == f"Bearer {TOKEN}"

    def _refuse(self, code: str, status: int = 404, headers: Mapping[str, str] = {}) -> None:  # noqa: B006
        self._send(status, b"", True, {"X-Error-Code": code, **headers})

    def _json(self, value: Any, with_body: bool, status: int = 200) -> None:
        self._send(
            status, json.dumps(value).encode(), with_body, {"Content-Type": "application/json"}
        )

    def _send(self, status: int, data: bytes, body: bool, headers: Mapping[str, str]) -> None:
        self.send_response(HTTPStatus(status))
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _info(repo: Repo, commit: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    siblings = [
        {"rfilename": name, "size": len(data), "blobId": _etag(data)}
        for name, data in files.items()
    ]
    return {
        "_id": "0",
        "id": repo.id,
        "sha": commit,
        "private": False,
        "gated": "auto" if repo.gated else False,
        "tags": [],
        "downloads": 0,
        "likes": 0,
        "siblings": siblings,
        "cardData": {"license": repo.licence},
    }


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
