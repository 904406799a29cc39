"""An S3 on loopback (moto's), which can be told to behave badly."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

BUCKET = "sweeps"


@dataclass
class Behaviour:
    """What the server does wrong: it ignores If-None-Match, or does the next `lost` writes and then
    answers that it failed. requests: what was asked of it, as ``PUT /bucket/key``."""

    ignores_condition: bool = False
    lost: int = 0
    down: bool = False
    requests: list[str] = field(default_factory=list)


@contextmanager
def s3_server() -> Iterator[tuple[str, Behaviour]]:
    """Serve an S3 with one bucket; gives its address and its behaviour."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    behaviour = Behaviour()
    app = _misbehaving(DomainDispatcherApplication(create_backend_app), behaviour)
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", behaviour
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment(address: str) -> dict[str, str]:
    """Return the variables by which boto3 finds the server and nothing else."""
    return {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "NO_PROXY": "127.0.0.1",
    }


def empty_bucket(address: str) -> None:
    """Forget everything and make the bucket."""
    for method, path in (("POST", "/moto-api/reset"), ("PUT", f"/{BUCKET}")):
        opener = build_opener(ProxyHandler({}))  # the environment may name a proxy
        opener.open(Request(address + path, method=method), timeout=60).close()


def _misbehaving(app: Callable[..., Iterable[bytes]], behaviour: Behaviour) -> Callable[..., Any]:
    def serve(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        behaviour.requests.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        if behaviour.down:
            return _fail(start)
        if behaviour.ignores_condition:
            environ.pop("HTTP_IF_NONE_MATCH", None)
        answer = app(environ, start if behaviour.lost < 1 else lambda *given: None)
        if behaviour.lost < 1 or environ["REQUEST_METHOD"] != "PUT":
            return answer
        behaviour.lost -= 1
        return _fail(start)

    return serve


def _fail(start: Callable[..., Any]) -> Iterable[bytes]:
    start("503 Service Unavailable", [("Content-Length", "0")])
    return []
